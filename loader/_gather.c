/* Crops out of tiles, one memcpy per row of a tile: the compiled twin of tiles._gather_one.

   Addresses come from loader.shards, which has checked them against the mapped files. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

enum { CHANNELS = 3 };

static void gather_crop(const uint8_t *tiles, int64_t cols, int64_t tile, int64_t top, int64_t left,
                        int64_t height, int64_t width, uint8_t *out)
{
    const int64_t tile_row = tile * CHANNELS, out_row = width * CHANNELS;

    for (int64_t y = 0; y < height;) {
        const int64_t row = (top + y) / tile, in_y = (top + y) % tile;
        const int64_t lines = tile - in_y < height - y ? tile - in_y : height - y;

        for (int64_t x = 0; x < width;) {
            const int64_t col = (left + x) / tile, in_x = (left + x) % tile;
            const int64_t pixels = tile - in_x < width - x ? tile - in_x : width - x;
            const uint8_t *from = tiles + (((row * cols + col) * tile + in_y) * tile + in_x) * CHANNELS;
            uint8_t *to = out + (y * width + x) * CHANNELS;

            if (pixels == 64) /* whole tiles of the default size: a constant length is copied inline */
                for (int64_t i = 0; i < lines; i++, from += tile_row, to += out_row)
                    memcpy(to, from, 64 * CHANNELS);
            else
                for (int64_t i = 0; i < lines; i++, from += tile_row, to += out_row)
                    memcpy(to, from, (size_t)(pixels * CHANNELS));
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
