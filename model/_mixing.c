/* The parts of ShuffleMixer that work pixel by pixel, fused: the compiled twins of what model.fused describes.

   Images are float32, channels last. A block of pixels goes through norm, matrix products and SiLU while it is in the
   cache, so that nothing between an operation's input and its output is ever written to memory; the backward passes
   compute it again. Work is cut into parts that depend on shapes alone, each with sums of gradients of its own, which
   are added in order: results do not depend on the number of threads. Threads are those of the caller's OpenMP. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

enum { PIXELS = 64, PARTS = 16, BAND = 32, GROUPS = 8, IN_HALF = GROUPS / 2 };
enum { COLOURS = 3, TAPS = 9, TAIL = 32 }; /* values of the 3x3 convolution to RGB, TAPS * COLOURS, rounded up */

typedef float Four __attribute__((vector_size(16)));

typedef struct {
    const float *x, *other, *skip; /* `other`: the output's gradient, where there is one */
    float *out, *sums;             /* `sums`: gradients of weights, for each part */
    const float *weights;          /* packed by the callers below */
    int64_t images, height, width, channels, hidden, factor, kernel;
    int64_t size;           /* floats in the sums of a part */
    const float *tail_bias; /* NULL where there is no tail */
} Work;

typedef void Part(const Work *, int64_t part, int64_t parts, float *scratch);

/* What a mix needs of its weights: norm (C), MLP in (half, hidden), bias, MLP out (hidden, half) and bias, these two
   in the order of the output; and, for the backward pass, both matrices the other way. */
typedef struct {
    const float *norm, *in, *in_bias, *out, *out_bias, *in_back, *out_back;
} Mix;

/* Weights of an enlargement: for each of factor^2 places a matrix (in, out), then biases, then the matrices (out, in);
   the tail's as a matrix (C, TAIL) that makes of each pixel what it gives to its 9 neighbours, and the other way. */
typedef struct {
    const float *in, *bias, *back, *tail, *tail_back;
} Places;

typedef struct {
    Part *part;
    const Work *work;
    int64_t parts, room; /* `room`: floats of scratch for a thread */
    float *scratch;
    atomic_llong next, threads;
} Job;

typedef void Parallel(void (*)(void *), void *, unsigned, unsigned);
static Parallel *parallel; /* GOMP_parallel of the OpenMP that torch uses: a pool of our own would fight it */

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

/* Do all parts, and add what they summed into `sums`, in order. Returns 0 where memory is lacking. */
static int run(Part *part, Work *work, int64_t parts, int64_t room, int threads, float *sums)
{
    if (threads < 1 || !parallel)
        threads = 1;
    float *scratch = malloc((size_t)(threads * room) * sizeof *scratch);
    work->sums = sums ? calloc((size_t)(parts * work->size), sizeof *sums) : NULL;
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

/* ---- One version for each kind of processor ---- */

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
#define ROWS 8 /* of a tile in registers, and vectors in a row */
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

/* The version with the longest vectors that this processor has, up to `lanes` of them; NULL where torch is to do it. */
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

/* ---- What Python calls: addresses and sizes, which model.fused has made sure of ---- */

typedef unsigned long long Address;
#define FLOATS(address) ((float *)(uintptr_t)(address))

static PyObject *start(PyObject *module, PyObject *args)
{
    Address address;
    int lanes;
    (void)module;
    if (!PyArg_ParseTuple(args, "Ki", &address, &lanes))
        return NULL;
    memcpy(&parallel, &address, sizeof parallel);
    version = pick(&lanes);
    return PyLong_FromLong(lanes);
}

static PyObject *done(int fits) { return fits ? Py_NewRef(Py_None) : PyErr_NoMemory(); }

static PyObject *mix(PyObject *module, PyObject *args)
{
    Address x, slope, skip, out, weights, sums;
    long long pixels, channels, hidden;
    int threads, fits;
    (void)module;
    if (!PyArg_ParseTuple(args, "KKKKKKLLLi", &x, &slope, &skip, &out, &weights, &sums, &pixels, &channels, &hidden,
                          &threads))
        return NULL;
    Work work = {.x = FLOATS(x), .other = FLOATS(slope), .skip = FLOATS(skip), .out = FLOATS(out),
                 .weights = FLOATS(weights), .images = 1, .height = 1, .width = pixels, .channels = channels,
                 .hidden = hidden, .size = channels + hidden * channels + hidden + channels / 2};
    Py_BEGIN_ALLOW_THREADS
    if (slope)
        fits = run(version->mix_backward, &work, PARTS, PIXELS * (3 * (channels + hidden) + 1), threads, FLOATS(sums));
    else
        fits = run(version->mix, &work, PARTS, PIXELS * (channels + hidden), threads, NULL);
    Py_END_ALLOW_THREADS
    return done(fits);
}

static PyObject *project(PyObject *module, PyObject *args)
{
    Address x, slope, skip, out, weights, sums;
    long long pixels, channels, wide;
    int threads, fits;
    (void)module;
    if (!PyArg_ParseTuple(args, "KKKKKKLLLi", &x, &slope, &skip, &out, &weights, &sums, &pixels, &channels, &wide,
                          &threads))
        return NULL;
    Work work = {.x = FLOATS(x), .other = FLOATS(slope), .skip = FLOATS(skip), .out = FLOATS(out),
                 .weights = FLOATS(weights), .images = 1, .height = 1, .width = pixels, .channels = channels,
                 .hidden = wide, .size = wide * channels + channels};
    Py_BEGIN_ALLOW_THREADS
    fits = run(slope ? version->project_backward : version->project, &work, PARTS, PIXELS * wide, threads,
               slope ? FLOATS(sums) : NULL);
    Py_END_ALLOW_THREADS
    return done(fits);
}

static PyObject *enlarge(PyObject *module, PyObject *args)
{
    Address x, slope, tail_bias, out, weights, sums;
    long long images, height, width, channels, factor;
    int threads, fits;
    (void)module;
    if (!PyArg_ParseTuple(args, "KKKKKKLLLLLi", &x, &slope, &tail_bias, &out, &weights, &sums, &images, &height,
                          &width, &channels, &factor, &threads))
        return NULL;
    const int64_t places = factor * factor, wide = width * factor + 2, block = PIXELS * channels;
    Work work = {.x = FLOATS(x), .other = FLOATS(slope), .out = FLOATS(out), .weights = FLOATS(weights),
                 .images = images, .height = height, .width = width, .channels = channels, .factor = factor,
                 .tail_bias = FLOATS(tail_bias),
                 .size = places * channels * (channels + 1) + (tail_bias ? TAIL * channels : 0)};
    Py_BEGIN_ALLOW_THREADS
    if (slope)
        fits = run(version->enlarge_backward, &work, PARTS,
                   3 * block + PIXELS * TAIL + (factor + 2) * (wide * COLOURS + 1), threads, FLOATS(sums));
    else if (tail_bias)
        fits = run(version->enlarge_to_rgb, &work, images * ((height + BAND - 1) / BAND),
                   block + 2 * factor * wide * TAIL, threads, NULL);
    else
        fits = run(version->enlarge, &work, PARTS, block, threads, NULL);
    Py_END_ALLOW_THREADS
    return done(fits);
}

static PyObject *depthwise(PyObject *module, PyObject *args)
{
    Address x, slope, sums;
    long long images, height, width, channels, kernel;
    int threads, fits;
    (void)module;
    if (!PyArg_ParseTuple(args, "KKKLLLLLi", &x, &slope, &sums, &images, &height, &width, &channels, &kernel, &threads))
        return NULL;
    Work work = {.x = FLOATS(x), .other = FLOATS(slope), .images = images, .height = height, .width = width,
                 .channels = channels, .kernel = kernel, .size = (kernel * kernel + 1) * channels};
    Py_BEGIN_ALLOW_THREADS
    fits = run(version->depthwise, &work, PARTS, 1, threads, FLOATS(sums));
    Py_END_ALLOW_THREADS
    return done(fits);
}

static PyMethodDef methods[] = {
    {"start", start, METH_VARARGS,
     "start(address of GOMP_parallel, most lanes of vectors): the lanes there are; without any, nothing else may run."},
    {"mix", mix, METH_VARARGS, "mix(x, slope, skip, out, weights, sums, pixels, channels, hidden, threads)"},
    {"project", project, METH_VARARGS, "project(x, slope, skip, out, weights, sums, pixels, channels, wide, threads)"},
    {"enlarge", enlarge, METH_VARARGS,
     "enlarge(x, slope, tail_bias, out, weights, sums, images, height, width, channels, factor, threads)"},
    {"depthwise", depthwise, METH_VARARGS,
     "depthwise(x, slope, sums, images, height, width, channels, kernel, threads)"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_mixing", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__mixing(void) { return PyModule_Create(&definition); }
