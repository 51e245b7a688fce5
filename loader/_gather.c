/* Crops out of tiles, one memcpy per row of a tile: the compiled twin of tiles._gather_one.

   Addresses come from loader.shards, which has checked them against the mapped files. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define VECTORS __attribute__((target_clones("avx2", "default")))
#else
#define VECTORS
#endif

#if defined(__GNUC__)
#define PREFETCH(address) __builtin_prefetch(address)
#else
#define PREFETCH(address) ((void)0)
#endif

enum { CHANNELS = 3, CACHE_LINE = 64 };

/* Copy `lines` rows of `bytes`, and ask for as many bytes from `next` on, so that they wait in the cache when their
   turn comes: tiles lie in many places, and the processor cannot guess the next one. */
static inline __attribute__((always_inline)) void copy_rows(uint8_t *to, int64_t to_step, const uint8_t *from,
                                                            int64_t from_step, int64_t lines, int64_t bytes,
                                                            const uint8_t *next)
{
    for (int64_t i = 0; i < lines; i++, to += to_step, from += from_step, next += from_step) {
        for (int64_t at = 0; at < from_step; at += CACHE_LINE)
            PREFETCH(next + at);
        memcpy(to, from, (size_t)bytes);
    }
}

VECTORS
static void gather_crop(const uint8_t *tiles, int64_t cols, int64_t tile, int64_t top, int64_t left, int64_t height,
                        int64_t width, uint8_t *out)
{
    const int64_t tile_row = tile * CHANNELS, tile_bytes = tile * tile_row, out_row = width * CHANNELS;

    for (int64_t y = 0; y < height;) {
        const int64_t row = (top + y) / tile, in_y = (top + y) % tile;
        const int64_t lines = tile - in_y < height - y ? tile - in_y : height - y;

        for (int64_t x = 0; x < width;) {
            const int64_t col = (left + x) / tile, in_x = (left + x) % tile;
            const int64_t pixels = tile - in_x < width - x ? tile - in_x : width - x;
            const uint8_t *corner = tiles + (row * cols + col) * tile_bytes + in_y * tile_row;
            const uint8_t *from = corner + in_x * CHANNELS;
            uint8_t *to = out + (y * width + x) * CHANNELS;
            /* the tile to the right, or the first one of the next row; the last tile of all asks for itself */
            const uint8_t *next = corner;
            if (x + pixels < width)
                next = corner + tile_bytes;
            else if (y + lines < height)
                next = tiles + ((row + 1) * cols + left / tile) * tile_bytes;

            if (pixels == 64 && tile == 64) /* whole tiles of the default size: constant lengths are copied inline */
                copy_rows(to, out_row, from, 64 * CHANNELS, lines, 64 * CHANNELS, next);
            else
                copy_rows(to, out_row, from, tile_row, lines, pixels * CHANNELS, next);
            x += pixels;
        }
        y += lines;
    }
}

static PyObject *gather(PyObject *module, PyObject *args)
{
    Py_buffer address, cols, top, left, out;
    Py_ssize_t tile, height, width;

    (void)module;
    if (!PyArg_ParseTuple(args, "y*y*y*y*nnnw*", &address, &cols, &top, &left, &tile, &height, &width, &out))
        return NULL;

    const Py_ssize_t bytes = address.len, count = bytes / (Py_ssize_t)sizeof(int64_t);
    const int fits = tile > 0 && height > 0 && width > 0 && cols.len == bytes && top.len == bytes &&
                     left.len == bytes && out.len == count * height * width * CHANNELS;
    if (fits) {
        const int64_t *a = address.buf, *c = cols.buf, *t = top.buf, *l = left.buf;
        uint8_t *to = out.buf;
        Py_BEGIN_ALLOW_THREADS
        for (Py_ssize_t i = 0; i < count; i++, to += height * width * CHANNELS)
            gather_crop((const uint8_t *)(intptr_t)a[i], c[i], tile, t[i], l[i], height, width, to);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&address);
    PyBuffer_Release(&cols);
    PyBuffer_Release(&top);
    PyBuffer_Release(&left);
    PyBuffer_Release(&out);
    if (!fits) {
        PyErr_SetString(PyExc_ValueError, "gather: the arrays' lengths do not fit one another");
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"gather", gather, METH_VARARGS,
     "gather(address, cols, top, left, tile, height, width, out): copy one crop per int64 entry into out."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_gather", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__gather(void) { return PyModule_Create(&definition); }
