/* The gather kernel: copy crops out of tiles under one of the 8 transforms. tiles.copy_crop and tiles.transformed are
   its fallback.

   Tiles are scattered in memory and hardware prefetching cannot predict them, so the coming ones are prefetched while
   others are copied. Rows are copied one by one, mirrored or not, each from all tiles that it crosses. Transposed crops
   are copied tile by tile, in blocks transposed in vector registers. Addresses come from loader.pixels.shards, which
   checks crops against the mapped files. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__)
#define VECTORS __attribute__((target_clones("avx2", "ssse3", "default")))
#else
#define VECTORS
#endif
#define INLINE static inline __attribute__((always_inline))

enum { CHANNELS = 3, CACHE_LINE = 64, LINES_AHEAD = 16, WRITES_AHEAD = 4 };
enum { STAGE = 4096, LARGE = 4 << 20 }; /* bytes: longest line that is streamed; smallest output that is */
enum { MIRROR_COLUMNS = 1, MIRROR_ROWS = 2, TRANSPOSE = 4 }; /* bits of a transform */

typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(16)));
typedef uint64_t Halves __attribute__((vector_size(16)));

typedef struct {
    const uint8_t *tiles;
    int64_t cols, tile, top, left, height, width, transform;
} Crop;

/* The part of a crop in one tile. Steps are in bytes; a negative one runs backwards. */
typedef struct {
    const uint8_t *from, *next; /* `next`: the tile to prefetch */
    uint8_t *to, *next_to;
    int64_t lines, pixels;                    /* in the source */
    int64_t next_pixels;                      /* output lines to prefetch from `next_to` on */
    int64_t from_step, line_step, pixel_step; /* between source lines; in `to`, per source line and per source pixel */
} Piece;

INLINE void prefetch(const uint8_t *at, int64_t bytes)
{
    for (int64_t i = 0; i < bytes; i += CACHE_LINE)
        __builtin_prefetch(at + i);
}

/* The same for writing. */
INLINE void prefetch_for_writing(const uint8_t *at, int64_t bytes)
{
    for (int64_t i = 0; i < bytes; i += CACHE_LINE)
        __builtin_prefetch(at + i, 1);
}

/* Write a line with non-temporal stores, if available. `to` and `bytes` are multiples of a cache line. */
INLINE void stream(uint8_t *to, const uint8_t *from, int64_t bytes)
{
#if defined(__SSE2__)
    for (int64_t i = 0; i < bytes; i += 16)
        _mm_stream_si128((__m128i *)(to + i), _mm_load_si128((const __m128i *)(from + i)));
#else
    memcpy(to, from, (size_t)bytes);
#endif
}

/* Load four pixels: 16 bytes at once if the 4 bytes beyond may be read, otherwise in words. */
INLINE Bytes load_four(const uint8_t *from, int wide)
{
    if (wide) {
        Bytes all;
        memcpy(&all, from, 16);
        return all;
    }
    uint64_t low;
    uint32_t high;
    memcpy(&low, from, 8);
    memcpy(&high, from + 8, 4);
    return (Bytes)(Halves){low, high};
}

INLINE void store_four(uint8_t *to, Bytes all, int wide)
{
    if (wide) {
        memcpy(to, &all, 16);
        return;
    }
    const uint64_t low = ((Halves)all)[0];
    const uint32_t high = ((Words)all)[2];
    memcpy(to, &low, 8);
    memcpy(to + 8, &high, 4);
}

/* Load five pixels in reverse order without reading beyond them: the upper half holds bytes 7 to 14. */
INLINE Bytes load_mirrored(const uint8_t *from)
{
    uint64_t low, high;
    memcpy(&low, from, 8);
    memcpy(&high, from + 7, 8);
    const Bytes all = (Bytes)(Halves){low, high};
    return __builtin_shufflevector(all, all, 13, 14, 15, 10, 11, 12, 6, 7, 9, 3, 4, 5, 0, 1, 2, 0);
}

INLINE void mirror_row(uint8_t *to, const uint8_t *from, int64_t pixels)
{
    int64_t x = 0; /* in `to`; the 16th byte of a store is overwritten by the next */
    for (; x + 5 < pixels; x += 5) {
        const Bytes five = load_mirrored(from + (pixels - x - 5) * CHANNELS);
        memcpy(to + x * CHANNELS, &five, 16);
    }
    for (; x < pixels; x++)
        memcpy(to + x * CHANNELS, from + (pixels - x - 1) * CHANNELS, CHANNELS);
}

/* A line of a crop: its start in the first tile that it crosses, and the lines left in that row of tiles. */
typedef struct {
    const uint8_t *at;
    int64_t left;
} Line;

INLINE Line line_of(const Crop *crop, int64_t y)
{
    const int64_t tile_row = crop->tile * CHANNELS, row = (crop->top + y) / crop->tile;
    const int64_t in_y = (crop->top + y) % crop->tile, first = row * crop->cols + crop->left / crop->tile;
    return (Line){crop->tiles + (first * crop->tile + in_y) * tile_row, crop->tile - in_y};
}

INLINE void to_next_line(Line *line, const Crop *crop)
{
    const int64_t tile_row = crop->tile * CHANNELS;
    line->at += tile_row;
    if (--line->left == 0) { /* from the end of a tile to the tile below */
        line->at += (crop->cols - 1) * crop->tile * tile_row;
        line->left = crop->tile;
    }
}

INLINE void prefetch_line(Line *line, const Crop *crop, int64_t tiles)
{
    const int64_t tile_row = crop->tile * CHANNELS;
    for (int64_t i = 0; i < tiles; i++)
        prefetch(line->at + i * crop->tile * tile_row, tile_row);
    to_next_line(line, crop);
}

INLINE void copy_pixels(uint8_t *to, const uint8_t *from, int64_t pixels, int mirrored)
{
    if (mirrored)
        mirror_row(to, from, pixels);
    else if (pixels == 64) /* a full line of a default tile: copies of constant length are inlined */
        memcpy(to, from, 64 * CHANNELS);
    else
        memcpy(to, from, (size_t)(pixels * CHANNELS));
}

/* Copy a crop line by line, each from all tiles that it crosses; `out` is filled from its first or its last line on.

   A large output is evicted from the caches before it is used. Non-temporal stores avoid reading the lines that will be
   overwritten, a third of the memory traffic, and do not pollute the caches. Lines are assembled in `stage`. */
INLINE void gather_lines(const Crop *crop, const Crop *next, int mirrored, int large, uint8_t *out)
{
    const int64_t tile = crop->tile, row = crop->width * CHANNELS, in_x = crop->left % tile;
    const int64_t tiles = (in_x + crop->width + tile - 1) / tile, step = crop->transform & MIRROR_ROWS ? -row : row;
    const int64_t ahead = crop->height < LINES_AHEAD ? crop->height : LINES_AHEAD;
    const int streamed = large && row <= STAGE && row % CACHE_LINE == 0 && (uintptr_t)out % CACHE_LINE == 0;
    Line line = line_of(crop, 0), coming = line_of(crop, ahead), after = line_of(next, 0);
    uint8_t stage[STAGE] __attribute__((aligned(CACHE_LINE)));

    if (step < 0)
        out += (crop->height - 1) * row;
    for (int64_t y = 0; y < crop->height; y++, out += step) {
        const uint8_t *from = line.at + in_x * CHANNELS;
        uint8_t *to = streamed ? stage : out;

        if (!streamed)
            prefetch_for_writing(out + WRITES_AHEAD * step, row);
        if (y + ahead < crop->height)
            prefetch_line(&coming, crop, tiles);
        else
            prefetch_line(&after, next, tiles);
        for (int64_t x = 0, pixels; x < crop->width; x += pixels) {
            const int64_t room = x ? tile : tile - in_x;
            pixels = room < crop->width - x ? room : crop->width - x;
            copy_pixels(to + (mirrored ? crop->width - x - pixels : x) * CHANNELS, from, pixels, mirrored);
            from += ((tile - 1) * tile + room) * CHANNELS; /* the same line in the next tile */
        }
        if (streamed)
            stream(out, stage, row);
        to_next_line(&line, crop);
    }
}

/* Transpose four lines of four pixels. */
INLINE void transpose_block(const uint8_t *from, int64_t from_step, int wide_from, uint8_t *to, int64_t to_step,
                            int wide_to)
{
    Words row[4], pair[4];
    for (int i = 0; i < 4; i++) {
        const Bytes all = load_four(from + i * from_step, wide_from);
        row[i] = (Words)__builtin_shufflevector(all, all, 0, 1, 2, 15, 3, 4, 5, 15, 6, 7, 8, 15, 9, 10, 11, 15);
    }
    for (int i = 0; i < 2; i++) {
        pair[i] = __builtin_shufflevector(row[2 * i], row[2 * i + 1], 0, 4, 1, 5);
        pair[i + 2] = __builtin_shufflevector(row[2 * i], row[2 * i + 1], 2, 6, 3, 7);
    }
    row[0] = __builtin_shufflevector(pair[0], pair[1], 0, 1, 4, 5);
    row[1] = __builtin_shufflevector(pair[0], pair[1], 2, 3, 6, 7);
    row[2] = __builtin_shufflevector(pair[2], pair[3], 0, 1, 4, 5);
    row[3] = __builtin_shufflevector(pair[2], pair[3], 2, 3, 6, 7);
    for (int i = 0; i < 4; i++) {
        const Bytes all = (Bytes)row[i];
        const Bytes packed =
            __builtin_shufflevector(all, all, 0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 15, 15, 15, 15);
        store_four(to + i * to_step, packed, wide_to);
    }
}

/* Store four lines of a piece as columns. With `wide`, stores may spill into the columns of the next two lines. */
INLINE void place_four_columns(const uint8_t *from, int64_t from_step, int64_t pixels, uint8_t *to, int64_t to_step,
                               int wide)
{
    int64_t j = 0;
    for (; j + 6 <= pixels; j += 4) /* a load of 16 bytes touches the sixth pixel */
        transpose_block(from + j * CHANNELS, from_step, 1, to + j * to_step, to_step, wide);
    for (; j + 4 <= pixels; j += 4)
        transpose_block(from + j * CHANNELS, from_step, 0, to + j * to_step, to_step, wide);
    for (; j < pixels; j++)
        for (int k = 0; k < 4; k++)
            memcpy(to + j * to_step + k * CHANNELS, from + k * from_step + j * CHANNELS, CHANNELS);
}

/* Store the lines of a piece as columns. */
INLINE void place_columns(Piece piece)
{
    const int64_t row = piece.from_step;
    int64_t i = 0;
    if (piece.line_step < 0) { /* start with the last line, so that stores run forwards */
        piece.next_to += (piece.lines - 1) * piece.line_step;
        piece.from += (piece.lines - 1) * piece.from_step;
        piece.to += (piece.lines - 1) * piece.line_step;
        piece.from_step = -piece.from_step;
        piece.line_step = -piece.line_step;
    }
    for (; i + 4 <= piece.lines; i += 4) {
        const uint8_t *from = piece.from + i * piece.from_step;
        uint8_t *to = piece.to + i * piece.line_step;
        prefetch(piece.next + i * row, 4 * row);
        for (int64_t j = i; j < i + 4 && j < piece.next_pixels; j++)
            prefetch_for_writing(piece.next_to + j * piece.pixel_step, piece.lines * CHANNELS);
        if (i + 6 <= piece.lines)
            place_four_columns(from, piece.from_step, piece.pixels, to, piece.pixel_step, 1);
        else
            place_four_columns(from, piece.from_step, piece.pixels, to, piece.pixel_step, 0);
    }
    for (; i < piece.lines; i++)
        for (int64_t j = 0; j < piece.pixels; j++)
            memcpy(piece.to + i * piece.line_step + j * piece.pixel_step,
                   piece.from + i * piece.from_step + j * CHANNELS, CHANNELS);
}

/* Copy a transposed crop tile by tile. */
INLINE void gather_columns(const Crop *crop, uint8_t *out)
{
    const int64_t tile = crop->tile, tile_row = tile * CHANNELS, tile_bytes = tile * tile_row;
    int64_t line_step = CHANNELS, pixel_step = crop->height * CHANNELS;

    if (crop->transform & MIRROR_COLUMNS) { /* pixels run backwards from the last position */
        out += (crop->width - 1) * pixel_step;
        pixel_step = -pixel_step;
    }
    if (crop->transform & MIRROR_ROWS) {
        out += (crop->height - 1) * line_step;
        line_step = -line_step;
    }
    for (int64_t y = 0, lines; y < crop->height; y += lines) {
        const int64_t in_y = (crop->top + y) % tile;
        lines = tile - in_y < crop->height - y ? tile - in_y : crop->height - y;

        for (int64_t x = 0, pixels; x < crop->width; x += pixels) {
            const int64_t in_x = (crop->left + x) % tile;
            const uint8_t *line = line_of(crop, y).at + ((crop->left + x) / tile - crop->left / tile) * tile_bytes;
            Piece piece = {
                .from = line + in_x * CHANNELS,
                .next = line, /* the last piece prefetches itself */
                .to = out + y * line_step + x * pixel_step,
                .next_to = out,
                .lines = lines,
                .pixels = pixels = tile - in_x < crop->width - x ? tile - in_x : crop->width - x,
                .from_step = tile_row,
                .line_step = line_step,
                .pixel_step = pixel_step,
            };
            if (x + pixels < crop->width) {
                piece.next = line + tile_bytes;
                piece.next_to = piece.to + pixels * pixel_step;
                piece.next_pixels = tile < crop->width - x - pixels ? tile : crop->width - x - pixels;
            } else if (y + lines < crop->height) {
                piece.next = line_of(crop, y + lines).at;
                piece.next_to = out + (y + lines) * line_step;
                piece.next_pixels = tile - crop->left % tile < crop->width ? tile - crop->left % tile : crop->width;
            }
            place_columns(piece);
        }
    }
}

VECTORS
static void gather_crop(const Crop *crop, const Crop *next, int large, uint8_t *out)
{
    if (crop->transform & TRANSPOSE)
        gather_columns(crop, out);
    else if (crop->transform & MIRROR_COLUMNS)
        gather_lines(crop, next, 1, large, out);
    else
        gather_lines(crop, next, 0, large, out);
}

/* Arguments. Everything that can be checked is checked here, since any Python code may call these functions. Whether
   the addresses are readable cannot be: the caller guarantees it. */

/* Get the buffer of a C-contiguous array of native integers of `size` bytes, signed ('i') or unsigned ('u'). Returns 0
   with an exception set otherwise; the caller releases the buffer on success only. */
static int take_array(PyObject *object, const char *name, Py_ssize_t size, char kind, int flags, Py_buffer *view)
{
    if (PyObject_GetBuffer(object, view, PyBUF_ND | PyBUF_FORMAT | flags) != 0)
        return 0;
    const char *format = view->format == NULL ? "B" : view->format;
    if (*format == '@' || *format == '=')
        format++;
    if (view->itemsize == size && *format != '\0' && format[1] == '\0' &&
        strchr(kind == 'u' ? "BHILQN" : "bhilqn", *format) != NULL)
        return 1;
    PyErr_Format(PyExc_TypeError, "%s: expected a C-contiguous array of %s, got items of format '%.20s'", name,
                 kind == 'u' ? "uint8" : "int64", view->format == NULL ? "B" : view->format);
    PyBuffer_Release(view);
    return 0;
}

/* Return a copy of a column of int64, which no other thread can change after the checks; the caller frees it. NULL with
   an exception set on failure. `count` is the length of the first column, -1 while that is read. */
static int64_t *take_column(PyObject *object, const char *name, Py_ssize_t *count)
{
    Py_buffer view;
    int64_t *values = NULL;

    if (!take_array(object, name, sizeof(int64_t), 'i', 0, &view))
        return NULL;
    if (*count < 0 && view.ndim == 1)
        *count = view.shape[0];
    if (view.ndim != 1 || view.shape[0] != *count)
        PyErr_Format(PyExc_ValueError, "%s: expected %zd entries, as in the first array, got %zd",
                     name, *count, view.len / view.itemsize);
    else if ((values = PyMem_Malloc(view.len > 0 ? (size_t)view.len : 1)) == NULL)
        PyErr_NoMemory();
    else if (view.len > 0)
        memcpy(values, view.buf, (size_t)view.len);
    PyBuffer_Release(&view);
    return values;
}

/* Return an error message about a crop, or NULL. No arithmetic on a crop that passes can overflow, even though the
   kernel computes addresses, but reads nothing, up to LINES_AHEAD lines beyond it. */
static const char *crop_error(const Crop *crop)
{
    int64_t right, bottom, bytes;

    if ((uint64_t)crop->transform > 7)
        return "transform: expected 0 to 7";
    if ((crop->transform & TRANSPOSE) && crop->height != crop->width)
        return "transform: expected square crops where one is transposed";
    if (crop->top < 0 || crop->left < 0)
        return "top, left: expected 0 or more";
    if (__builtin_add_overflow(crop->left, crop->width, &right) ||
        __builtin_mul_overflow(crop->cols, crop->tile, &bytes) || crop->cols < 1 || right > bytes)
        return "left: expected a crop within its rows of tiles";
    if (__builtin_mul_overflow(bytes, crop->tile * CHANNELS, &bytes) ||
        __builtin_add_overflow(crop->top, crop->height, &bottom) ||
        __builtin_add_overflow(bottom, (LINES_AHEAD + 1) * crop->tile, &bottom) ||
        __builtin_mul_overflow(bytes, bottom / crop->tile + 1, &bytes) ||
        (uint64_t)(uintptr_t)crop->tiles > (uint64_t)INTPTR_MAX - (uint64_t)bytes || bytes > INTPTR_MAX)
        return "top: expected a crop within the address space";
    if (crop->tiles == NULL)
        return "address: expected a valid one, got 0";
    return NULL;
}

enum { ADDRESS, COLS, TOP, LEFT, TRANSFORM, COLUMNS };
static const char *const column_names[COLUMNS] = {"address", "cols", "top", "left", "transform"};

static PyObject *gather(PyObject *module, PyObject *args)
{
    PyObject *given[COLUMNS], *given_out, *result = NULL;
    int64_t *values[COLUMNS] = {NULL};
    Py_ssize_t tile, height, width, count = -1, size = 0;
    Py_buffer out = {0};
    const char *problem = NULL;

    (void)module;
    if (!PyArg_ParseTuple(args, "OOOOOnnnO", &given[0], &given[1], &given[2], &given[3], &given[4], &tile, &height,
                          &width, &given_out))
        return NULL;
    if (!take_array(given_out, "out", 1, 'u', PyBUF_WRITABLE, &out))
        return NULL;
    for (int i = 0; i < COLUMNS; i++)
        if ((values[i] = take_column(given[i], column_names[i], &count)) == NULL)
            goto done;

    if (tile < 1 || height < 1 || width < 1 || tile >= 1 << 30 || height >= 1 << 30 || width >= 1 << 30)
        problem = "tile, height, width: expected 1 to 2**30 - 1";
    else if (__builtin_mul_overflow(height, width, &size) || __builtin_mul_overflow(size, CHANNELS, &size) ||
             out.ndim != 4 ||
             out.shape[0] != count || out.shape[1] != height || out.shape[2] != width || out.shape[3] != CHANNELS)
        problem = "out: expected (n, height, width, 3), with n as in the other arrays";
    for (Py_ssize_t i = 0; i < count && problem == NULL; i++) {
        const Crop crop = {(const uint8_t *)(intptr_t)values[ADDRESS][i], values[COLS][i], tile, values[TOP][i],
                           values[LEFT][i], height, width, values[TRANSFORM][i]};
        problem = crop_error(&crop);
    }
    if (problem != NULL) {
        PyErr_Format(PyExc_ValueError, "gather: %s", problem);
        goto done;
    }
    uint8_t *to = out.buf;
    Py_BEGIN_ALLOW_THREADS
    Crop crop, next = {0};
    for (Py_ssize_t i = count; i >= 0; i--) { /* one iteration early: each crop needs the next one */
        crop = next;
        if (i > 0)
            next = (Crop){(const uint8_t *)(intptr_t)values[ADDRESS][i - 1], values[COLS][i - 1], tile,
                          values[TOP][i - 1], values[LEFT][i - 1], height, width, values[TRANSFORM][i - 1]};
        if (i < count)
            gather_crop(&crop, &next, out.len >= LARGE, to + i * size);
    }
#if defined(__SSE2__)
    _mm_sfence(); /* make non-temporal stores visible to other threads */
#endif
    Py_END_ALLOW_THREADS
    result = Py_NewRef(Py_None);

done:
    for (int i = 0; i < COLUMNS; i++)
        PyMem_Free(values[i]);
    PyBuffer_Release(&out);
    return result;
}

static PyObject *advise(PyObject *module, PyObject *args)
{
    PyObject *given_address, *given_length, *result = NULL;
    int64_t *address, *length = NULL;
    Py_ssize_t count = -1;
    int advice;
    const char *problem = NULL;

    (void)module;
    if (!PyArg_ParseTuple(args, "OOi", &given_address, &given_length, &advice))
        return NULL;
    if ((address = take_column(given_address, "address", &count)) == NULL ||
        (length = take_column(given_length, "length", &count)) == NULL)
        goto done;
    /* Other advice changes the content of memory, or what child processes inherit. */
    if (advice != MADV_NORMAL && advice != MADV_RANDOM && advice != MADV_SEQUENTIAL && advice != MADV_WILLNEED &&
        advice != MADV_DONTNEED)
        problem = "advice: expected MADV_NORMAL, RANDOM, SEQUENTIAL, WILLNEED or DONTNEED";
    for (Py_ssize_t i = 0; i < count && problem == NULL; i++)
        if (address[i] <= 0 || length[i] < 0 || length[i] > INTPTR_MAX - address[i])
            problem = "address, length: expected ranges within the address space";
    if (problem != NULL) {
        PyErr_Format(PyExc_ValueError, "advise: %s", problem);
        goto done;
    }
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < count; i++)
        (void)madvise((void *)(intptr_t)address[i], (size_t)length[i], advice); /* the system may decline */
    Py_END_ALLOW_THREADS
    result = Py_NewRef(Py_None);

done:
    PyMem_Free(address);
    PyMem_Free(length);
    return result;
}

static PyMethodDef methods[] = {
    {"gather", gather, METH_VARARGS,
     "gather(address, cols, top, left, transform, tile, height, width, out)\n\n"
     "Copy one crop per entry of the int64 arrays (n,) into out, uint8 (n, height, width, 3).\n\n"
     "Raises TypeError or ValueError for arrays of another type or length, crops outside their rows of tiles,\n"
     "transforms outside 0 to 7, and sizes that overflow. Addresses cannot be checked: the caller guarantees that the\n"
     "memory from each of them to the end of the crop's last row of tiles is readable."},
    {"advise", advise, METH_VARARGS,
     "advise(address, length, advice)\n\n"
     "Call madvise for each range of the int64 arrays (n,). Errors of madvise are ignored.\n\n"
     "Raises TypeError or ValueError for arrays of another type or length, negative ranges, and advice that changes\n"
     "more than caching. Addresses cannot be checked: MADV_DONTNEED discards the content of private memory."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_gather", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__gather(void) { return PyModule_Create(&definition); }
