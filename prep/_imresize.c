/* Shrinking uint8 images as MATLAB does, in integers: the compiled twin of imresize._shrink.

   Rows are combined first, and rounded to bytes. Columns then become rows by transposing a strip of LANES lines, so
   that both passes are the same loop over neighbouring bytes, which compilers turn into vector instructions. */

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

/* out[i] = round(sum over k of numerators[k] * rows[k][i] / denominator). Called with constants for taps and
   denominator, so that the loop over k unrolls and the one over i becomes vector instructions. */
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
        sum = sum < 0 ? 0 : sum; /* so that division and shift agree */
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

/* Swap the bytes of two words where the shifted mask says so: one step of a transposition. */
static inline void exchange(uint64_t *a, uint64_t *b, int shift, uint64_t mask)
{
    const uint64_t swap = ((*a >> shift) ^ *b) & mask;
    *b ^= swap;
    *a ^= swap << shift;
}

/* Eight little-endian words as 8 × 8 bytes, transposed: halves, then quarters, then bytes change places. */
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

static PyObject *shrink(PyObject *module, PyObject *args)
{
    Py_buffer image, rows, cols, numerators, out;
    Py_ssize_t taps;
    Job job;
    const char *problem = NULL;

    (void)module;
    if (!PyArg_ParseTuple(args, "y*nnny*ny*ny*nw*", &image, &job.height, &job.width, &job.channels, &rows,
                          &job.out_height, &cols, &job.out_width, &numerators, &taps, &out))
        return NULL;
    job.row_window = rows.buf;
    job.col_window = cols.buf;
    job.weights.numerators = numerators.buf;
    job.weights.taps = (int)taps;

    if (job.height < 1 || job.width < 1 || job.channels < 1 || image.len != job.height * job.width * job.channels ||
        (taps != 8 && taps != 11 && taps != 16 && taps != 32) || numerators.len != taps * (Py_ssize_t)sizeof(int32_t) ||
        rows.len != job.out_height * taps * (Py_ssize_t)sizeof(int64_t) ||
        cols.len != job.out_width * taps * (Py_ssize_t)sizeof(int64_t) ||
        out.len != job.out_height * job.out_width * job.channels)
        problem = "shrink: the arrays' lengths do not fit one another";
    else if (!windows_fit(job.row_window, job.out_height * taps, job.height) ||
             !windows_fit(job.col_window, job.out_width * taps, job.width))
        problem = "shrink: a window reaches beyond the image";
    else {
        uint8_t *scratch = PyMem_RawMalloc((size_t)(LANES * job.channels * 2 * (job.width + job.out_width)));
        if (scratch == NULL)
            problem = "shrink: no memory for a strip of the image";
        else {
            Py_BEGIN_ALLOW_THREADS
            shrink_image(image.buf, &job, scratch, out.buf);
            Py_END_ALLOW_THREADS
        }
        PyMem_RawFree(scratch);
    }
    PyBuffer_Release(&image);
    PyBuffer_Release(&rows);
    PyBuffer_Release(&cols);
    PyBuffer_Release(&numerators);
    PyBuffer_Release(&out);
    if (problem != NULL) {
        PyErr_SetString(PyExc_ValueError, problem);
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"shrink", shrink, METH_VARARGS,
     "shrink(image, height, width, channels, row_window, out_height, col_window, out_width, numerators, taps, "
     "out): one image, uint8; windows int64 (outputs, taps); numerators int32, symmetric."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_imresize", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__imresize(void) { return PyModule_Create(&definition); }
