/* The resize kernel: shrink uint8 images as MATLAB does, in integers. imresize._shrink is its fallback.

   Rows are combined first and rounded to bytes. A strip of LANES lines is then transposed, so that columns become rows
   and both passes are the same loop over adjacent bytes, which compilers vectorise. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define VECTORS __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define VECTORS
#endif

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define LITTLE_ENDIAN_WORDS 1
#else
#define LITTLE_ENDIAN_WORDS 0
#endif

enum { LANES = 64, MAX_TAPS = 32 };

typedef struct {
    const int32_t *numerators; /* symmetric */
    int taps;
} Weights;

static inline uint8_t to_byte(int32_t value) { return (uint8_t)(value < 0 ? 0 : value > 255 ? 255 : value); }

/* out[i] = round(sum over k of numerators[k] * rows[k][i] / denominator). Callers pass constant taps and denominator,
   so that the loop over k is unrolled and the loop over i vectorised. */
static inline __attribute__((always_inline)) void combine_constant(const uint8_t *const *rows,
                                                                   const int32_t *numerators, int taps,
                                                                   int denominator, Py_ssize_t count,
                                                                   uint8_t *restrict out)
{
    for (Py_ssize_t i = 0; i < count; i++) {
        int32_t sum = denominator / 2;
        for (int k = 0; k < taps / 2; k++)
            sum += numerators[k] * (rows[k][i] + rows[taps - 1 - k][i]);
        if (taps % 2)
            sum += numerators[taps / 2] * rows[taps / 2][i];
        sum = sum < 0 ? 0 : sum; /* so that the division may become a shift */
        out[i] = to_byte(sum / denominator);
    }
}

VECTORS
static void combine(const uint8_t *const *rows, const Weights *weights, Py_ssize_t count, uint8_t *out)
{
    switch (weights->taps) {
    case 8:
        combine_constant(rows, weights->numerators, 8, 256, count, out);
        break;
    case 11:
        combine_constant(rows, weights->numerators, 11, 81, count, out);
        break;
    case 16:
        combine_constant(rows, weights->numerators, 16, 4096, count, out);
        break;
    case 32:
        combine_constant(rows, weights->numerators, 32, 65536, count, out);
        break;
    }
}

/* Swap the bytes of two words that the shifted mask selects: one step of a transposition. */
static inline void exchange(uint64_t *a, uint64_t *b, int shift, uint64_t mask)
{
    const uint64_t swap = ((*a >> shift) ^ *b) & mask;
    *b ^= swap;
    *a ^= swap << shift;
}

/* Transpose 8 × 8 bytes in eight little-endian words: swap halves, then quarters, then bytes. */
static inline void transpose_words(uint64_t *w)
{
    for (int i = 0; i < 4; i++)
        exchange(&w[i], &w[i + 4], 32, 0x00000000FFFFFFFFu);
    for (int i = 0; i < 8; i += (i & 1) ? 3 : 1)
        exchange(&w[i], &w[i + 2], 16, 0x0000FFFF0000FFFFu);
    for (int i = 0; i < 8; i += 2)
        exchange(&w[i], &w[i + 1], 8, 0x00FF00FF00FF00FFu);
}

/* to[c][r] = from[r][c] */
static void transpose(const uint8_t *from, Py_ssize_t from_step, Py_ssize_t rows, Py_ssize_t cols, uint8_t *to,
                      Py_ssize_t to_step)
{
    for (Py_ssize_t c = 0; c < cols; c += 8)
        for (Py_ssize_t r = 0; r < rows; r += 8) {
            if (LITTLE_ENDIAN_WORDS && c + 8 <= cols && r + 8 <= rows) {
                uint64_t words[8];
                for (int i = 0; i < 8; i++)
                    memcpy(&words[i], from + (r + i) * from_step + c, 8);
                transpose_words(words);
                for (int i = 0; i < 8; i++)
                    memcpy(to + (c + i) * to_step + r, &words[i], 8);
                continue;
            }
            for (Py_ssize_t i = c; i < c + 8 && i < cols; i++)
                for (Py_ssize_t j = r; j < r + 8 && j < rows; j++)
                    to[i * to_step + j] = from[j * from_step + i];
        }
}

typedef struct {
    Py_ssize_t height, width, channels, out_height, out_width;
    const int64_t *row_window, *col_window;
    Weights weights;
} Job;

/* scratch: LANES * channels * (2 * width + 2 * out_width) bytes. */
static void shrink_image(const uint8_t *image, const Job *job, uint8_t *scratch, uint8_t *out)
{
    const int taps = job->weights.taps;
    const Py_ssize_t in_row = job->width * job->channels, out_row = job->out_width * job->channels;
    uint8_t *lines = scratch, *columns = lines + LANES * in_row, *shrunk = columns + LANES * in_row;
    const uint8_t *rows[MAX_TAPS];

    for (Py_ssize_t y0 = 0; y0 < job->out_height; y0 += LANES) {
        const Py_ssize_t count = job->out_height - y0 < LANES ? job->out_height - y0 : LANES;
        for (Py_ssize_t y = 0; y < count; y++) {
            for (int k = 0; k < taps; k++)
                rows[k] = image + job->row_window[(y0 + y) * taps + k] * in_row;
            combine(rows, &job->weights, in_row, lines + y * in_row);
        }
        transpose(lines, in_row, count, in_row, columns, LANES);
        for (Py_ssize_t x = 0; x < job->out_width; x++)
            for (Py_ssize_t c = 0; c < job->channels; c++) {
                for (int k = 0; k < taps; k++)
                    rows[k] = columns + (job->col_window[x * taps + k] * job->channels + c) * LANES;
                combine(rows, &job->weights, LANES, shrunk + (x * job->channels + c) * LANES);
            }
        transpose(shrunk, LANES, out_row, count, out + y0 * out_row, out_row);
    }
}

static int windows_fit(const int64_t *window, Py_ssize_t count, Py_ssize_t length)
{
    for (Py_ssize_t i = 0; i < count; i++)
        if (window[i] < 0 || window[i] >= length)
            return 0;
    return 1;
}

/* True if weights are symmetric and no sum of weighted bytes overflows int32. */
static int weights_fit(const int32_t *numerators, Py_ssize_t taps)
{
    int64_t most = 1 << 16; /* more than half of any denominator */
    for (Py_ssize_t k = 0; k < taps; k++) {
        most += 255 * (numerators[k] < 0 ? -(int64_t)numerators[k] : (int64_t)numerators[k]);
        if (numerators[k] != numerators[taps - 1 - k])
            return 0;
    }
    return most <= INT32_MAX;
}

/* Get the buffer of a C-contiguous array of native integers of `size` bytes, of a type in `formats`. Returns 0 with an
   exception set otherwise; the caller releases the buffer on success only. */
static int take_array(PyObject *object, const char *name, const char *formats, Py_ssize_t size, int flags,
                      Py_buffer *view)
{
    if (PyObject_GetBuffer(object, view, PyBUF_ND | PyBUF_FORMAT | flags) != 0)
        return 0;
    const char *format = view->format == NULL ? "B" : view->format;
    if (*format == '@' || *format == '=')
        format++;
    if (view->itemsize == size && *format != '\0' && format[1] == '\0' && strchr(formats, *format) != NULL)
        return 1;
    PyErr_Format(PyExc_TypeError, "shrink: %s: expected C-contiguous items of %zd bytes of type %s, got format '%.20s'",
                 name, size, formats, view->format == NULL ? "B" : view->format);
    PyBuffer_Release(view);
    return 0;
}

/* Return a copy of an array, which no other thread can change after the checks; the caller frees it. NULL with an
   exception set on failure. */
static void *take_copy(PyObject *object, const char *name, const char *formats, Py_ssize_t size, Py_ssize_t count)
{
    Py_buffer view;
    void *copy = NULL;

    if (!take_array(object, name, formats, size, 0, &view))
        return NULL;
    if (view.len / size != count)
        PyErr_Format(PyExc_ValueError, "shrink: %s: expected %zd entries, got %zd",
                     name, count, view.len / size);
    else if ((copy = PyMem_Malloc((size_t)view.len)) == NULL)
        PyErr_NoMemory();
    else
        memcpy(copy, view.buf, (size_t)view.len);
    PyBuffer_Release(&view);
    return copy;
}

/* a * b * c, or 0 on overflow. */
static Py_ssize_t product(Py_ssize_t a, Py_ssize_t b, Py_ssize_t c)
{
    Py_ssize_t all;
    return __builtin_mul_overflow(a, b, &all) || __builtin_mul_overflow(all, c, &all) ? 0 : all;
}

static PyObject *shrink(PyObject *module, PyObject *args)
{
    PyObject *given_image, *given_rows, *given_cols, *given_weights, *given_out, *result = NULL;
    int64_t *rows = NULL, *cols = NULL;
    int32_t *numerators = NULL;
    uint8_t *scratch = NULL;
    Py_ssize_t taps, columns;
    Py_buffer image = {0}, out = {0};
    Job job;

    (void)module;
    if (!PyArg_ParseTuple(args, "OnnnOnOnOnO", &given_image, &job.height, &job.width, &job.channels, &given_rows,
                          &job.out_height, &given_cols, &job.out_width, &given_weights, &taps, &given_out))
        return NULL;
    if (job.height < 1 || job.width < 1 || job.channels < 1 || job.out_height < 1 || job.out_width < 1 ||
        (taps != 8 && taps != 11 && taps != 16 && taps != 32)) {
        PyErr_SetString(PyExc_ValueError, "shrink: expected sides of 1 or more, and 8, 11, 16 or 32 taps");
        return NULL;
    }
    if (!take_array(given_image, "image", "B", 1, 0, &image) ||
        !take_array(given_out, "out", "B", 1, PyBUF_WRITABLE, &out))
        goto done;
    /* Empty buffers are refused: a product of 0 means overflow. */
    if (image.len == 0 || image.len != product(job.height, job.width, job.channels) || out.len == 0 ||
        out.len != product(job.out_height, job.out_width, job.channels)) {
        PyErr_SetString(PyExc_ValueError, "shrink: image, out: expected lengths that match their shapes");
        goto done;
    }
    if (product(job.out_height, taps, sizeof(int64_t)) == 0 || product(job.out_width, taps, sizeof(int64_t)) == 0 ||
        __builtin_add_overflow(job.width, job.out_width, &columns) ||
        (columns = product(columns, 2 * LANES, job.channels)) == 0) {
        PyErr_SetString(PyExc_ValueError, "shrink: expected sizes that do not overflow");
        goto done;
    }
    if ((rows = take_copy(given_rows, "row_window", "lqn", sizeof(int64_t), job.out_height * taps)) == NULL ||
        (cols = take_copy(given_cols, "col_window", "lqn", sizeof(int64_t), job.out_width * taps)) == NULL ||
        (numerators = take_copy(given_weights, "numerators", "il", sizeof(int32_t), taps)) == NULL)
        goto done;
    if (!windows_fit(rows, job.out_height * taps, job.height) || !windows_fit(cols, job.out_width * taps, job.width)) {
        PyErr_SetString(PyExc_ValueError, "shrink: windows: expected pixels within the image");
        goto done;
    }
    if (!weights_fit(numerators, taps)) {
        PyErr_SetString(PyExc_ValueError, "shrink: numerators: expected symmetric weights whose sums fit into int32");
        goto done;
    }
    if ((scratch = PyMem_Malloc((size_t)columns)) == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    job.row_window = rows;
    job.col_window = cols;
    job.weights.numerators = numerators;
    job.weights.taps = (int)taps;
    Py_BEGIN_ALLOW_THREADS
    shrink_image(image.buf, &job, scratch, out.buf);
    Py_END_ALLOW_THREADS
    result = Py_NewRef(Py_None);

done:
    PyMem_Free(rows);
    PyMem_Free(cols);
    PyMem_Free(numerators);
    PyMem_Free(scratch);
    PyBuffer_Release(&image);
    PyBuffer_Release(&out);
    return result;
}

static PyMethodDef methods[] = {
    {"shrink", shrink, METH_VARARGS,
     "shrink(image, height, width, channels, row_window, out_height, col_window, out_width, numerators, taps, out)\n\n"
     "Shrink an image, uint8 (height, width, channels), into out, uint8 (out_height, out_width, channels). The windows\n"
     "are int64 (outputs, taps), numbers of input pixels; the numerators int32 (taps,), symmetric.\n\n"
     "Raises TypeError or ValueError for arrays of another type or length, windows beyond the image, and sizes or\n"
     "weights that could overflow."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_imresize", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__imresize(void) { return PyModule_Create(&definition); }
