/* The mixing kernel: ShuffleMixer's pixel-wise operations. model.cpu.operations has the same in torch's operations.

   Images are float32, channels last. A block of pixels passes through norm, matrix products and SiLU while it is in
   cache, so intermediate values never reach memory; the backward passes compute them again. Work is divided into parts
   by shape alone. Each part sums its own gradients of the weights, and these sums are added in order, so results do not
   depend on the number of threads. Threads come from the caller's OpenMP. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <dlfcn.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

enum { PIXELS = 64, PARTS = 16, BAND = 32, GROUPS = 8, IN_HALF = GROUPS / 2 };
enum { COLOURS = 3, TAPS = 9, TAIL = 32 }; /* TAPS * COLOURS values of the 3x3 convolution to RGB, rounded up */

typedef float Four __attribute__((vector_size(16)));

typedef struct {
    const float *x, *other, *skip; /* `other`: the gradient of the output, or NULL */
    float *out, *sums;             /* `sums`: gradients of weights, one set per part */
    const float *weights;          /* packed as Mix and Places below describe */
    int64_t images, height, width, channels, hidden, factor, kernel;
    int64_t size;           /* floats in the sums of one part */
    const float *tail_bias; /* NULL without a tail */
} Work;

typedef void Part(const Work *, int64_t part, int64_t parts, float *scratch);

/* Weights of a mix: norm (C), first matrix (half, hidden) and bias, second matrix (hidden, half) and bias, these two
   in the order of the shuffled output; for the backward pass, both matrices transposed. */
typedef struct {
    const float *norm, *in, *in_bias, *out, *out_bias, *in_back, *out_back;
} Mix;

/* Weights of an enlargement: a matrix (in, out) for each of the factor^2 output pixels of an input pixel, their biases,
   and the matrices transposed; the tail as a matrix (C, TAIL) that gives what a pixel contributes to its 9 neighbours,
   and its transpose. */
typedef struct {
    const float *in, *bias, *back, *tail, *tail_back;
} Places;

typedef struct {
    Part *part;
    const Work *work;
    int64_t parts, room; /* `room`: floats of scratch per thread */
    float *scratch;
    atomic_llong next, threads;
} Job;

typedef void Parallel(void (*)(void *), void *, unsigned, unsigned);
static Parallel *parallel; /* GOMP_parallel of the OpenMP that torch uses: a second thread pool would compete with it */

static void add_parts(float *to, const float *sums, int64_t parts, int64_t size)
{
    memset(to, 0, (size_t)size * sizeof *to);
    for (int64_t part = 0; part < parts; part++)
        for (int64_t i = 0; i < size; i++)
            to[i] += sums[part * size + i];
}

static void run_parts(void *data)
{
    Job *job = data;
    float *scratch = job->scratch + atomic_fetch_add(&job->threads, 1) * job->room;
    for (int64_t i; (i = atomic_fetch_add(&job->next, 1)) < job->parts;)
        job->part(job->work, i, job->parts, scratch);
}

/* a * b and a + b of sizes; -1 if an operand is negative or the result overflows. */
static int64_t times(int64_t a, int64_t b)
{
    int64_t result;
    return a < 0 || b < 0 || __builtin_mul_overflow(a, b, &result) ? -1 : result;
}

static int64_t plus(int64_t a, int64_t b)
{
    int64_t result;
    return a < 0 || b < 0 || __builtin_add_overflow(a, b, &result) ? -1 : result;
}

/* Run all parts, then add their sums into `sums`, in order. Returns 0 if out of memory. */
static int run(Part *part, Work *work, int64_t parts, int64_t room, int threads, float *sums)
{
    if (!parallel)
        threads = 1;
    const int64_t bytes = times(times(threads, room), sizeof(float)), all = times(parts, work->size);
    if (bytes < 0 || all < 0)
        return 0;
    float *scratch = malloc((size_t)bytes);
    work->sums = sums ? calloc((size_t)all, sizeof *sums) : NULL;
    const int fits = scratch && (!sums || work->sums);
    if (fits) {
        Job job = {part, work, parts, room, scratch, 0, 0};
        if (threads > 1)
            parallel(run_parts, &job, (unsigned)threads, 0);
        else
            run_parts(&job);
        if (sums)
            add_parts(sums, work->sums, parts, work->size);
    }
    free(scratch);
    free(work->sums);
    return fits;
}

/* ---- One version per instruction set ---- */

typedef struct {
    Part *mix, *mix_backward, *project, *project_backward, *enlarge, *enlarge_to_rgb, *enlarge_backward, *depthwise;
} Version;

#define VERSION                                                                                                        \
    {NAMED(mix_part),     NAMED(mix_part_backward),   NAMED(project_part),          NAMED(project_part_backward),      \
     NAMED(enlarge_part), NAMED(enlarge_to_rgb_part), NAMED(enlarge_part_backward), NAMED(depthwise_part)}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#define NAMED(name) name##_v4
#define LANES 16
#define ROWS 8 /* of a tile in registers; WIDE: vectors in each row */
#define WIDE 2
#include "_mixing_parts.h"
static const Version version_v4 = VERSION;
#undef NAMED
#undef LANES
#undef ROWS
#undef WIDE
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define NAMED(name) name##_v3
#define LANES 8
#define ROWS 6
#define WIDE 2
#include "_mixing_parts.h"
static const Version version_v3 = VERSION;
#undef NAMED
#undef LANES
#undef ROWS
#undef WIDE
#pragma GCC pop_options
#endif

/* The version with the longest vectors that the processor has, of at most `lanes` floats; NULL if it has none. */
static const Version *pick(int *lanes)
{
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
    __builtin_cpu_init();
    if (*lanes >= 16 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512cd")) {
        *lanes = 16;
        return &version_v4;
    }
    if (*lanes >= 8 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("bmi2")) {
        *lanes = 8;
        return &version_v3;
    }
#endif
    *lanes = 0;
    return NULL;
}

static const Version *version;

/* ---- Functions for Python. They check every buffer against the sizes, so no call reads or writes outside one ---- */

/* Channels: one pixel is kept on the stack. Threads: libgomp ends the process if it cannot start them. */
enum { STEP = 32, MOST_CHANNELS = 2048, MOST_THREADS = 1024, ARRAYS = 6 };

typedef struct {
    Py_buffer views[ARRAYS];
    int count;
} Held;

static void release(Held *held)
{
    while (held->count)
        PyBuffer_Release(&held->views[--held->count]);
}

/* Point `to` at a C-contiguous float32 buffer of exactly `floats` values, to be released with `held`; at NULL for None,
   if `optional`. Returns 0, with an exception set, for anything else. */
static int take(Held *held, PyObject *array, const char *name, int64_t floats, int writable, int optional, float **to)
{
    *to = NULL;
    if (array == Py_None && optional)
        return 1;
    if (floats < 0) {
        PyErr_Format(PyExc_ValueError, "expected sizes whose product fits, got more for %s", name);
        return 0;
    }
    Py_buffer *view = &held->views[held->count];
    if (PyObject_GetBuffer(array, view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0)) < 0)
        return 0;
    held->count++;
    if (!view->format || strcmp(view->format, "f") != 0 || view->itemsize != sizeof(float)) {
        PyErr_Format(PyExc_TypeError, "expected %s to be of float32, got format '%s'", name,
                     view->format ? view->format : "B");
        return 0;
    }
    if (view->len / (Py_ssize_t)sizeof(float) != floats) {
        PyErr_Format(PyExc_ValueError, "expected %s to hold %lld floats, got %zd", name, (long long)floats,
                     view->len / (Py_ssize_t)sizeof(float));
        return 0;
    }
    if ((uintptr_t)view->buf % _Alignof(float)) {
        PyErr_Format(PyExc_ValueError, "expected %s to be aligned to %d bytes", name, (int)_Alignof(float));
        return 0;
    }
    *to = view->buf;
    return 1;
}

/* Returns 1 if a size is a multiple of `step` from `step` to `most`; else 0, with an exception set. */
static int fits(const char *name, long long value, long long step, long long most)
{
    if (value >= step && value <= most && value % step == 0)
        return 1;
    PyErr_Format(PyExc_ValueError, "expected %s to be a multiple of %lld from %lld to %lld, got %lld", name, step, step,
                 most, value);
    return 0;
}

static int ready(int threads)
{
    if (!version) {
        PyErr_SetString(PyExc_RuntimeError, "expected start() to have found vectors to compute with");
        return 0;
    }
    return fits("threads", threads, 1, MOST_THREADS);
}

/* Release the buffers; return None, or set MemoryError if memory was not enough. */
static PyObject *done(Held *held, int enough)
{
    release(held);
    return enough ? Py_NewRef(Py_None) : PyErr_NoMemory();
}

static PyObject *failed(Held *held)
{
    release(held);
    return NULL;
}

static PyObject *start(PyObject *module, PyObject *args)
{
    PyObject *path;
    int lanes;
    (void)module;
    if (!PyArg_ParseTuple(args, "O&i", PyUnicode_FSConverter, &path, &lanes))
        return NULL;
    void *library = dlopen(PyBytes_AS_STRING(path), RTLD_LAZY | RTLD_NOLOAD);
    Py_DECREF(path);
    void *found = library ? dlsym(library, "GOMP_parallel") : NULL;
    if (library)
        dlclose(library); /* torch keeps it loaded */
    memcpy(&parallel, &found, sizeof parallel);
    version = pick(&lanes);
    if (!found)
        version = NULL, lanes = 0;
    return PyLong_FromLong(lanes);
}

static PyObject *mix(PyObject *module, PyObject *args)
{
    PyObject *x, *slope, *skip, *out, *weights, *sums;
    long long pixels, channels, hidden;
    int threads, enough;
    float *in, *other, *added, *to, *packed, *summed;
    Held held = {.count = 0};
    (void)module;
    if (!PyArg_ParseTuple(args, "OOOOOOLLLi", &x, &slope, &skip, &out, &weights, &sums, &pixels, &channels, &hidden,
                          &threads))
        return NULL;
    if (!ready(threads) || !fits("pixels", pixels, 1, INT64_MAX) || !fits("channels", channels, STEP, MOST_CHANNELS) ||
        !fits("hidden", hidden, STEP / 2, INT64_MAX))
        return NULL;
    const int backward = slope != Py_None;
    const int64_t image = times(pixels, channels), half = channels / 2, matrix = times(half, hidden);
    const int64_t size = plus(plus(times(2, matrix), hidden), channels + half);
    if (!take(&held, x, "x", image, 0, 0, &in) || !take(&held, slope, "slope", image, 0, 1, &other) ||
        !take(&held, skip, "skip", image, 0, 1, &added) || !take(&held, out, "out", image, 1, 0, &to) ||
        !take(&held, weights, "weights", plus(size, times(2, matrix)), 0, 0, &packed) ||
        !take(&held, sums, "sums", size, 1, !backward, &summed))
        return failed(&held);
    Work work = {.x = in, .other = other, .skip = added, .out = to, .weights = packed, .images = 1, .height = 1,
                 .width = pixels, .channels = channels, .hidden = hidden, .size = size};
    const int64_t wide = plus(channels, hidden);
    Py_BEGIN_ALLOW_THREADS
    if (backward)
        enough = run(version->mix_backward, &work, PARTS, times(PIXELS, plus(times(3, wide), 1)), threads, summed);
    else
        enough = run(version->mix, &work, PARTS, times(PIXELS, wide), threads, NULL);
    Py_END_ALLOW_THREADS
    return done(&held, enough);
}

static PyObject *project(PyObject *module, PyObject *args)
{
    PyObject *x, *slope, *skip, *out, *weights, *sums;
    long long pixels, channels, wide;
    int threads, enough;
    float *in, *other, *added, *to, *packed, *summed;
    Held held = {.count = 0};
    (void)module;
    if (!PyArg_ParseTuple(args, "OOOOOOLLLi", &x, &slope, &skip, &out, &weights, &sums, &pixels, &channels, &wide,
                          &threads))
        return NULL;
    if (!ready(threads) || !fits("pixels", pixels, 1, INT64_MAX) || !fits("channels", channels, STEP, MOST_CHANNELS) ||
        !fits("wide", wide, STEP / 2, INT64_MAX))
        return NULL;
    const int backward = slope != Py_None;
    const int64_t image = times(pixels, channels), inner = times(pixels, wide), matrix = times(wide, channels);
    const int64_t size = plus(matrix, channels);
    if (!take(&held, x, "x", inner, 0, 0, &in) || !take(&held, slope, "slope", image, 0, 1, &other) ||
        !take(&held, skip, "skip", image, 0, backward, &added) ||
        !take(&held, out, "out", backward ? inner : image, 1, 0, &to) ||
        !take(&held, weights, "weights", plus(size, matrix), 0, 0, &packed) ||
        !take(&held, sums, "sums", size, 1, !backward, &summed))
        return failed(&held);
    Work work = {.x = in, .other = other, .skip = added, .out = to, .weights = packed, .images = 1, .height = 1,
                 .width = pixels, .channels = channels, .hidden = wide, .size = size};
    Py_BEGIN_ALLOW_THREADS
    enough = run(backward ? version->project_backward : version->project, &work, PARTS, times(PIXELS, wide), threads,
                 backward ? summed : NULL);
    Py_END_ALLOW_THREADS
    return done(&held, enough);
}

static PyObject *enlarge(PyObject *module, PyObject *args)
{
    PyObject *x, *slope, *tail_bias, *out, *weights, *sums;
    long long images, height, width, channels, factor;
    int threads, enough;
    float *in, *other, *bias, *to, *packed, *summed;
    Held held = {.count = 0};
    (void)module;
    if (!PyArg_ParseTuple(args, "OOOOOOLLLLLi", &x, &slope, &tail_bias, &out, &weights, &sums, &images, &height,
                          &width, &channels, &factor, &threads))
        return NULL;
    if (!ready(threads) || !fits("images", images, 1, INT64_MAX) || !fits("height", height, 1, INT64_MAX) ||
        !fits("width", width, 1, INT64_MAX) || !fits("channels", channels, STEP, MOST_CHANNELS) ||
        !fits("factor", factor, 1, 4))
        return NULL;
    const int backward = slope != Py_None, to_rgb = tail_bias != Py_None;
    const int64_t places = factor * factor, square = channels * channels, block = PIXELS * channels;
    const int64_t pixels = times(times(images, height), width), image = times(pixels, channels);
    const int64_t large = times(times(pixels, places), to_rgb ? COLOURS : channels);
    const int64_t size = places * (square + channels) + (to_rgb ? TAIL * channels : 0);
    const int64_t wide = plus(times(width, factor), 2), padded = plus(times(wide, COLOURS), 1);
    if (!take(&held, x, "x", image, 0, 0, &in) || !take(&held, slope, "slope", large, 0, 1, &other) ||
        !take(&held, tail_bias, "tail_bias", COLOURS, 0, 1, &bias) ||
        !take(&held, out, "out", backward ? image : large, 1, 0, &to) ||
        !take(&held, weights, "weights", size + places * square + (to_rgb ? TAIL * channels : 0), 0, 0, &packed) ||
        !take(&held, sums, "sums", size, 1, !backward, &summed))
        return failed(&held);
    Work work = {.x = in, .other = other, .out = to, .weights = packed, .images = images, .height = height,
                 .width = width, .channels = channels, .factor = factor, .tail_bias = bias, .size = size};
    Py_BEGIN_ALLOW_THREADS
    if (backward)
        enough = run(version->enlarge_backward, &work, PARTS,
                     plus(3 * block + PIXELS * TAIL, times(factor + 2, padded)), threads, summed);
    else if (to_rgb)
        enough = run(version->enlarge_to_rgb, &work, times(images, (height - 1) / BAND + 1),
                     plus(block, times(2 * factor * TAIL, wide)), threads, NULL);
    else
        enough = run(version->enlarge, &work, PARTS, block, threads, NULL);
    Py_END_ALLOW_THREADS
    return done(&held, enough);
}

static PyObject *depthwise(PyObject *module, PyObject *args)
{
    PyObject *x, *slope, *sums;
    long long images, height, width, channels, kernel;
    int threads, enough;
    float *in, *other, *summed;
    Held held = {.count = 0};
    (void)module;
    if (!PyArg_ParseTuple(args, "OOOLLLLLi", &x, &slope, &sums, &images, &height, &width, &channels, &kernel, &threads))
        return NULL;
    if (!ready(threads) || !fits("images", images, 1, INT64_MAX) || !fits("height", height, 1, INT64_MAX) ||
        !fits("width", width, 1, INT64_MAX) || !fits("channels", channels, STEP, MOST_CHANNELS))
        return NULL;
    if (kernel != 3 && kernel != 5 && kernel != 7)
        return PyErr_Format(PyExc_ValueError, "expected a kernel of 3, 5 or 7, got %lld", kernel);
    const int64_t image = times(times(times(images, height), width), channels);
    const int64_t size = (kernel * kernel + 1) * channels;
    if (!take(&held, x, "x", image, 0, 0, &in) || !take(&held, slope, "slope", image, 0, 0, &other) ||
        !take(&held, sums, "sums", size, 1, 0, &summed))
        return failed(&held);
    Work work = {.x = in, .other = other, .images = images, .height = height, .width = width, .channels = channels,
                 .kernel = kernel, .size = size};
    Py_BEGIN_ALLOW_THREADS
    enough = run(version->depthwise, &work, PARTS, 1, threads, summed);
    Py_END_ALLOW_THREADS
    return done(&held, enough);
}

static PyMethodDef methods[] = {
    {"start", start, METH_VARARGS,
     "start(path of the loaded library whose GOMP_parallel to use, most lanes of vectors): lanes in use; 0: none."},
    {"mix", mix, METH_VARARGS, "mix(x, slope, skip, out, weights, sums, pixels, channels, hidden, threads)"},
    {"project", project, METH_VARARGS, "project(x, slope, skip, out, weights, sums, pixels, channels, wide, threads)"},
    {"enlarge", enlarge, METH_VARARGS,
     "enlarge(x, slope, tail_bias, out, weights, sums, images, height, width, channels, factor, threads)"},
    {"depthwise", depthwise, METH_VARARGS,
     "depthwise(x, slope, sums, images, height, width, channels, kernel, threads)"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_mixing", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__mixing(void)
{
    PyObject *module = PyModule_Create(&definition);
    if (module && PyModule_AddIntConstant(module, "MOST_CHANNELS", MOST_CHANNELS) < 0)
        Py_CLEAR(module);
    return module;
}
