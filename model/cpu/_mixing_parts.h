/* The vector code of _mixing.c, included once for each instruction set, whose suffix NAMED adds to every name.

   The includer defines LANES, the floats in a vector, and ROWS and WIDE, the rows of a matrix tile in registers and the
   vectors in each row. target_clones would not work: it clones functions after the compiler has already split vectors
   to the size of the oldest instruction set. */

#define V NAMED(V)
#define I NAMED(I)
#define load_four NAMED(load_four)
#define load NAMED(load)
#define store NAMED(store)
#define splat NAMED(splat)
#define least NAMED(least)
#define total NAMED(total)
#define choose NAMED(choose)
#define sigmoid NAMED(sigmoid)
#define tile NAMED(tile)
#define columns_of NAMED(columns_of)
#define multiply NAMED(multiply)
#define add_rows NAMED(add_rows)
#define silu_backward NAMED(silu_backward)
#define silu NAMED(silu)
#define reorder NAMED(reorder)
#define order_back NAMED(order_back)
#define mix_of NAMED(mix_of)
#define normalise NAMED(normalise)
#define mix_block_backward NAMED(mix_block_backward)
#define mix_block NAMED(mix_block)
#define places_of NAMED(places_of)
#define tail_values NAMED(tail_values)
#define pad_slope NAMED(pad_slope)
#define correlate NAMED(correlate)

typedef float V __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));

/* LOW and HIGH interleave two vectors in groups of 4 channels; FIRST and SECOND undo this. */
#if LANES == 16
#define LOW (I){0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23}
#define HIGH (I){8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31}
#define FIRST (I){0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27}
#define SECOND (I){4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31}
#else
#define LOW (I){0, 1, 2, 3, 8, 9, 10, 11}
#define HIGH (I){4, 5, 6, 7, 12, 13, 14, 15}
#define FIRST LOW
#define SECOND HIGH
#endif

INLINE V load(const float *from)
{
    V value;
    memcpy(&value, from, sizeof value);
    return value;
}

INLINE void store(float *to, V value) { memcpy(to, &value, sizeof value); }

INLINE V splat(float value) { return value - (V){0}; }

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* The sum of all lanes, in each of them. */
INLINE V total(V v)
{
#if LANES == 16
    v += __builtin_shuffle(v, (I){8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7});
    v += __builtin_shuffle(v, (I){4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11});
    v += __builtin_shuffle(v, (I){2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13});
    v += __builtin_shuffle(v, (I){1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14});
#else
    v += __builtin_shuffle(v, (I){4, 5, 6, 7, 0, 1, 2, 3});
    v += __builtin_shuffle(v, (I){2, 3, 0, 1, 6, 7, 4, 5});
    v += __builtin_shuffle(v, (I){1, 0, 3, 2, 5, 4, 7, 6});
#endif
    return v;
}

/* In each lane, `yes` if all bits of `which` are set, `no` if none is. */
INLINE V choose(I which, V yes, V no)
{
    I a, b;
    memcpy(&a, &yes, sizeof a);
    memcpy(&b, &no, sizeof b);
    a = (a & which) | (b & ~which);
    memcpy(&yes, &a, sizeof a);
    return yes;
}

/* 1 / (1 + exp(-x)): exp(t) = 2^n * exp(r), |r| <= ln 2 / 2, with the Cephes library's polynomial for exp(r). */
INLINE V sigmoid(V x)
{
    const V high = splat(87.0f), magic = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    const V t = choose(x > high, -high, choose(x < -high, high, -x));
    const V n = (t * 1.44269504f + magic) - magic;
    V r = t - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const I power = (__builtin_convertvector(n, I) + 127) << 23;
    V scale;
    memcpy(&scale, &power, sizeof scale);
    return 1.0f / (1.0f + p * scale);
}

/* ---- Matrix products in cache ---- */

/* c[r, :] (+)= sum over i of a[r * a_row + i * a_step] * b[i, :], for a tile of c that fits in registers. */
INLINE void tile(int rows, int vectors, int64_t depth, const float *a, int64_t a_row, int64_t a_step, const float *b,
                 int64_t b_row, const float *bias, int add, float *c, int64_t c_row)
{
    V sum[ROWS][WIDE];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            sum[r][v] = add ? load(c + r * c_row + v * LANES) : bias ? load(bias + v * LANES) : (V){0};
    for (int64_t i = 0; i < depth; i++) {
        V line[WIDE];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            line[v] = load(b + i * b_row + v * LANES);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            const V factor = splat(a[r * a_row + i * a_step]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++)
                sum[r][v] += factor * line[v];
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            store(c + r * c_row + v * LANES, sum[r][v]);
}

/* `tile` for all rows, and for `vectors` vectors of columns. */
INLINE void columns_of(int vectors, int64_t rows, int64_t depth, const float *a, int64_t a_row, int64_t a_step,
                       const float *b, int64_t b_row, const float *bias, int add, float *c, int64_t c_row)
{
    int64_t r = 0;
    for (; r + ROWS <= rows; r += ROWS)
        tile(ROWS, vectors, depth, a + r * a_row, a_row, a_step, b, b_row, bias, add, c + r * c_row, c_row);
    for (; r < rows; r++)
        tile(1, vectors, depth, a + r * a_row, a_row, a_step, b, b_row, bias, add, c + r * c_row, c_row);
}

/* c (rows, columns) = a b + bias, or c += a b; `columns` is a multiple of LANES. a_row and a_step may transpose `a`. */
static void multiply(int64_t rows, int64_t columns, int64_t depth, const float *a, int64_t a_row, int64_t a_step,
                     const float *b, int64_t b_row, const float *bias, int add, float *c, int64_t c_row)
{
    int64_t j = 0;
    for (; j + WIDE * LANES <= columns; j += WIDE * LANES)
        columns_of(WIDE, rows, depth, a, a_row, a_step, b + j, b_row, bias ? bias + j : NULL, add, c + j, c_row);
    for (; j < columns; j += LANES)
        columns_of(1, rows, depth, a, a_row, a_step, b + j, b_row, bias ? bias + j : NULL, add, c + j, c_row);
}

static void add_rows(float *sum, const float *from, int64_t rows, int64_t columns)
{
    for (int64_t j = 0; j < columns; j += LANES) {
        V all = load(sum + j);
        for (int64_t r = 0; r < rows; r++)
            all += load(from + r * columns + j);
        store(sum + j, all);
    }
}

static void silu(float *to, const float *from, int64_t count)
{
    for (int64_t i = 0; i < count; i += LANES) {
        const V x = load(from + i);
        store(to + i, x * sigmoid(x));
    }
}

/* act = SiLU(x), to = slope * SiLU'(x); rows of `slope` are slope_row apart, other rows contiguous. */
static void silu_backward(float *act, float *to, const float *slope, int64_t slope_row, const float *from,
                          int64_t rows, int64_t columns)
{
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < columns; j += LANES) {
            const int64_t i = r * columns + j;
            const V x = load(from + i), s = sigmoid(x), y = x * s;
            store(act + i, y);
            store(to + i, load(slope + r * slope_row + j) * (s + y * (1.0f - s)));
        }
}

/* ---- Norm, MLP on half of the channels, shuffle, skip ---- */

/* Shuffle half of the channels: channel d * 4 + g comes from g * quarter + d. From two halves in this order, the output
   of the shuffle takes 4 channels of the first and 4 of the second in turn. */
INLINE void reorder(float *to, const float *from, int64_t quarter)
{
#if LANES == 16
    if (quarter == 4) {
        store(to, __builtin_shuffle(load(from), (I){0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15}));
        return;
    }
    if (quarter == 8) {
        const V a = load(from), b = load(from + LANES);
        store(to, __builtin_shuffle(a, b, (I){0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27}));
        store(to + LANES, __builtin_shuffle(a, b, (I){4, 12, 20, 28, 5, 13, 21, 29, 6, 14, 22, 30, 7, 15, 23, 31}));
        return;
    }
#endif
    for (int64_t d = 0; d < quarter; d++)
        for (int64_t g = 0; g < IN_HALF; g++)
            to[d * IN_HALF + g] = from[g * quarter + d];
}

INLINE void order_back(float *to, const float *from, int64_t quarter)
{
#if LANES == 16
    if (quarter == 4) {
        reorder(to, from, quarter);
        return;
    }
    if (quarter == 8) {
        const V a = load(from), b = load(from + LANES);
        store(to, __builtin_shuffle(a, b, (I){0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29}));
        store(to + LANES, __builtin_shuffle(a, b, (I){2, 6, 10, 14, 18, 22, 26, 30, 3, 7, 11, 15, 19, 23, 27, 31}));
        return;
    }
#endif
    for (int64_t d = 0; d < quarter; d++)
        for (int64_t g = 0; g < IN_HALF; g++)
            to[g * quarter + d] = from[d * IN_HALF + g];
}

static Mix mix_of(const float *weights, int64_t channels, int64_t hidden)
{
    const int64_t half = channels / 2, matrix = half * hidden;
    const float *in = weights + channels, *out = in + matrix + hidden;
    return (Mix){weights, in, in + matrix, out, out + matrix, out + matrix + half, out + 2 * matrix + half};
}

/* Write the normalised values of a pixel to `to`; return 1 / standard deviation in all lanes. */
INLINE V normalise(float *to, const float *x, int64_t channels)
{
    V sum = {0}, squares = {0};
    for (int64_t c = 0; c < channels; c += LANES)
        sum += load(x + c);
    const V mean = total(sum) / (float)channels;
    for (int64_t c = 0; c < channels; c += LANES) {
        const V centred = load(x + c) - mean;
        squares += centred * centred;
    }
    const V variance = total(squares) / (float)channels + 1e-5f;
    const float scale = 1.0f / __builtin_sqrtf(variance[0]);
    for (int64_t c = 0; c < channels; c += LANES)
        store(to + c, (load(x + c) - mean) * scale);
    return splat(scale);
}

INLINE void mix_block(const Work *work, const Mix *mix, int64_t start, int64_t count, int64_t channels, float *scratch)
{
    const int64_t half = channels / 2, hidden = work->hidden;
    float *first = scratch, *second = first + PIXELS * half, *inner = second + PIXELS * half;
    float *mixed = first; /* `first` is no longer needed by then */
    const float *x = work->x + start * channels;
    float normed[channels], *out = work->out + start * channels;

    for (int64_t p = 0; p < count; p++) {
        normalise(normed, x + p * channels, channels);
        for (int64_t c = 0; c < channels; c += LANES)
            store(normed + c, load(normed + c) * load(mix->norm + c));
        memcpy(first + p * half, normed, (size_t)half * sizeof(float));
        reorder(second + p * half, normed + half, half / IN_HALF);
    }
    multiply(count, hidden, half, first, half, 1, mix->in, hidden, mix->in_bias, 0, inner, hidden);
    silu(inner, inner, count * hidden);
    multiply(count, half, hidden, inner, hidden, 1, mix->out, half, mix->out_bias, 0, mixed, half);
    for (int64_t p = 0; p < count; p++)
        for (int64_t c = 0; c < half; c += LANES) {
            const V a = load(mixed + p * half + c), b = load(second + p * half + c);
            const int64_t at = p * channels + 2 * c;
            V low = __builtin_shuffle(a, b, LOW) + load(x + at);
            V high = __builtin_shuffle(a, b, HIGH) + load(x + at + LANES);
            if (work->skip) {
                low += load(work->skip + start * channels + at);
                high += load(work->skip + start * channels + at + LANES);
            }
            store(out + at, low);
            store(out + at + LANES, high);
        }
}

static void NAMED(mix_part)(const Work *work, int64_t part, int64_t parts, float *scratch)
{
    const int64_t pixels = work->images * work->height * work->width, channels = work->channels;
    const int64_t end = pixels * (part + 1) / parts;
    const Mix mix = mix_of(work->weights, channels, work->hidden);
    for (int64_t start = pixels * part / parts; start < end; start += PIXELS) {
        const int64_t count = least(PIXELS, end - start);
        if (channels == 64)
            mix_block(work, &mix, start, count, 64, scratch);
        else if (channels == 32)
            mix_block(work, &mix, start, count, 32, scratch);
        else
            mix_block(work, &mix, start, count, channels, scratch);
    }
}

INLINE void mix_block_backward(const Work *work, const Mix *mix, float *sums, int64_t start, int64_t count,
                               int64_t channels, float *scratch)
{
    const int64_t half = channels / 2, hidden = work->hidden, matrix = half * hidden;
    float *normed = scratch, *first = normed + PIXELS * channels, *d_mixed = first + PIXELS * half;
    float *d_second = d_mixed + PIXELS * half, *inner = d_second + PIXELS * half, *act = inner + PIXELS * hidden;
    float *d_act = act + PIXELS * hidden, *d_first = d_act + PIXELS * hidden, *scale = d_first + PIXELS * half;
    float *d_norm = sums, *d_in = d_norm + channels, *d_in_bias = d_in + matrix, *d_out = d_in_bias + hidden;
    const float *x = work->x + start * channels, *slope = work->other + start * channels;
    float *to = work->out + start * channels;

    for (int64_t p = 0; p < count; p++) {
        scale[p] = normalise(normed + p * channels, x + p * channels, channels)[0];
        float order[half];
        for (int64_t c = 0; c < half; c += LANES) {
            const V a = load(slope + p * channels + 2 * c), b = load(slope + p * channels + 2 * c + LANES);
            store(first + p * half + c, load(normed + p * channels + c) * load(mix->norm + c));
            store(d_mixed + p * half + c, __builtin_shuffle(a, b, FIRST));
            store(order + c, __builtin_shuffle(a, b, SECOND));
        }
        order_back(d_second + p * half, order, half / IN_HALF);
    }
    multiply(count, hidden, half, first, half, 1, mix->in, hidden, mix->in_bias, 0, inner, hidden);
    multiply(count, hidden, half, d_mixed, half, 1, mix->out_back, hidden, NULL, 0, d_act, hidden);
    silu_backward(act, d_act, d_act, hidden, inner, count, hidden);
    multiply(count, half, hidden, d_act, hidden, 1, mix->in_back, half, NULL, 0, d_first, half);
    multiply(half, hidden, count, first, 1, half, d_act, hidden, NULL, 1, d_in, hidden);
    multiply(hidden, half, count, act, 1, hidden, d_mixed, half, NULL, 1, d_out, half);
    add_rows(d_in_bias, d_act, count, hidden);
    add_rows(d_out + matrix, d_mixed, count, half);
    for (int64_t p = 0; p < count; p++) {
        V sum = {0}, product = {0};
        for (int64_t c = 0; c < channels; c += LANES) {
            const float *d_from = c < half ? d_first + p * half + c : d_second + p * half + c - half;
            const V d = load(d_from), n = load(normed + p * channels + c), weighted = d * load(mix->norm + c);
            store(d_norm + c, load(d_norm + c) + d * n);
            sum += weighted;
            product += weighted * n;
        }
        const V mean = total(sum) / (float)channels, along = total(product) / (float)channels;
        for (int64_t c = 0; c < channels; c += LANES) {
            const float *d_from = c < half ? d_first + p * half + c : d_second + p * half + c - half;
            const V weighted = load(d_from) * load(mix->norm + c), n = load(normed + p * channels + c);
            const int64_t at = p * channels + c;
            store(to + at, (weighted - mean - n * along) * splat(scale[p]) + load(slope + at));
        }
    }
}

static void NAMED(mix_part_backward)(const Work *work, int64_t part, int64_t parts, float *scratch)
{
    const int64_t pixels = work->images * work->height * work->width, channels = work->channels;
    const int64_t end = pixels * (part + 1) / parts;
    const Mix mix = mix_of(work->weights, channels, work->hidden);
    float *sums = work->sums + part * work->size;
    for (int64_t start = pixels * part / parts; start < end; start += PIXELS) {
        const int64_t count = least(PIXELS, end - start);
        if (channels == 64)
            mix_block_backward(work, &mix, sums, start, count, 64, scratch);
        else if (channels == 32)
            mix_block_backward(work, &mix, sums, start, count, 32, scratch);
        else
            mix_block_backward(work, &mix, sums, start, count, channels, scratch);
    }
}

/* ---- SiLU, matrix, skip ---- */

static void NAMED(project_part)(const Work *work, int64_t part, int64_t parts, float *scratch)
{
    const int64_t pixels = work->images * work->height * work->width, end = pixels * (part + 1) / parts;
    const int64_t channels = work->channels, wide = work->hidden;
    const float *bias = work->weights + wide * channels;
    for (int64_t start = pixels * part / parts; start < end; start += PIXELS) {
        const int64_t count = least(PIXELS, end - start);
        float *out = work->out + start * channels;
        silu(scratch, work->x + start * wide, count * wide);
        for (int64_t p = 0; p < count; p++)
            for (int64_t c = 0; c < channels; c += LANES)
                store(out + p * channels + c, load(work->skip + (start + p) * channels + c) + load(bias + c));
        multiply(count, channels, wide, scratch, wide, 1, work->weights, channels, NULL, 1, out, channels);
    }
}

static void NAMED(project_part_backward)(const Work *work, int64_t part, int64_t parts, float *scratch)
{
    const int64_t pixels = work->images * work->height * work->width, end = pixels * (part + 1) / parts;
    const int64_t channels = work->channels, wide = work->hidden;
    const float *back = work->weights + wide * channels + channels;
    float *sums = work->sums + part * work->size;
    for (int64_t start = pixels * part / parts; start < end; start += PIXELS) {
        const int64_t count = least(PIXELS, end - start);
        const float *slope = work->other + start * channels;
        float *to = work->out + start * wide;
        multiply(count, wide, channels, slope, channels, 1, back, wide, NULL, 0, to, wide);
        silu_backward(scratch, to, to, wide, work->x + start * wide, count, wide);
        multiply(wide, channels, count, scratch, 1, wide, slope, channels, NULL, 1, sums, channels);
        add_rows(sums + wide * channels, slope, count, channels);
    }
}

/* ---- Enlargement: matrix, pixel shuffle, SiLU; then, with a tail, the 3x3 convolution to RGB ---- */

static Places places_of(const Work *work)
{
    const int64_t places = work->factor * work->factor, channels = work->channels, square = channels * channels;
    const float *bias = work->weights + places * square, *back = bias + places * channels;
    const float *tail = back + places * square;
    return (Places){work->weights, bias, back, tail, tail + channels * TAIL};
}

INLINE Four load_four(const float *from)
{
    Four value;
    memcpy(&value, from, sizeof value);
    return value;
}

/* Compute the tail's values for output lines from_row to to_row of a line of input pixels, into lines of the ring. */
INLINE void tail_values(const Work *work, const Places *places, const float *x, int64_t from_row, int64_t to_row,
                        float *ring, int64_t ring_row, float *act)
{
    const int64_t channels = work->channels, factor = work->factor;
    for (int64_t start = 0; start < work->width; start += PIXELS) {
        const int64_t count = least(PIXELS, work->width - start);
        for (int64_t row = from_row; row < to_row; row++)
            for (int64_t column = 0; column < factor; column++) {
                const int64_t place = row * factor + column;
                multiply(count, channels, channels, x + start * channels, channels, 1,
                         places->in + place * channels * channels, channels, places->bias + place * channels, 0, act,
                         channels);
                silu(act, act, count * channels);
                multiply(count, TAIL, channels, act, channels, 1, places->tail, TAIL, NULL, 0,
                         ring + row * ring_row + (start * factor + column + 1) * TAIL, factor * TAIL);
            }
    }
}

/* A band of lines. Neighbouring lines are computed too, as far as the 3x3 convolution reaches. */
static void NAMED(enlarge_to_rgb_part)(const Work *work, int64_t part, int64_t parts, float *scratch)
{
    const int64_t height = work->height, width = work->width, channels = work->channels, factor = work->factor;
    const int64_t bands = parts / work->images, image = part / bands, first = part % bands * BAND;
    const int64_t end = least(height, first + BAND), wide = width * factor, ring_row = (wide + 2) * TAIL;
    const Places places = places_of(work);
    const float *x = work->x + image * height * width * channels;
    float *out = work->out + image * height * factor * wide * COLOURS;
    float *ring = scratch + PIXELS * channels; /* two lines of input pixels, `factor` lines of values each */

    memset(ring, 0, (size_t)(2 * factor * ring_row) * sizeof *ring);
    for (int64_t y = first - 1; y <= end; y++) {
        float *lines = ring + ((y + 2) % 2) * factor * ring_row;
        if (y < 0 || y >= height)
            memset(lines, 0, (size_t)(factor * ring_row) * sizeof *lines);
        else
            tail_values(work, &places, x + y * width * channels, y < first ? factor - 1 : 0, y == end ? 1 : factor,
                        lines, ring_row, scratch);
        for (int64_t to = y * factor - 1; to < (y + 1) * factor - 1; to++) {
            if (to < first * factor || to >= end * factor)
                continue;
            const float *line[3];
            for (int64_t i = 0; i < 3; i++)
                line[i] = ring + (to + i - 1 + 2 * factor) % (2 * factor) * ring_row + i * 3 * COLOURS;
            for (int64_t column = 0; column < wide; column++) {
                Four sum = {work->tail_bias[0], work->tail_bias[1], work->tail_bias[2], 0};
                for (int64_t i = 0; i < 3; i++)
                    for (int64_t j = 0; j < 3; j++)
                        sum += load_four(line[i] + (column + j) * TAIL + j * COLOURS);
                memcpy(out + (to * wide + column) * COLOURS, &sum, COLOURS * sizeof(float));
            }
        }
    }
}

static void NAMED(enlarge_part)(const Work *work, int64_t part, int64_t parts, float *scratch)
{
    const int64_t width = work->width, channels = work->channels, factor = work->factor;
    const int64_t lines = work->images * work->height;
    const Places places = places_of(work);
    for (int64_t line = lines * part / parts; line < lines * (part + 1) / parts; line++)
        for (int64_t start = 0; start < width; start += PIXELS)
            for (int64_t place = 0; place < factor * factor; place++) {
                const int64_t count = least(PIXELS, width - start), row = line * factor + place / factor;
                float *out = work->out + ((row * width + start) * factor + place % factor) * channels;
                multiply(count, channels, channels, work->x + (line * width + start) * channels, channels, 1,
                         places.in + place * channels * channels, channels, places.bias + place * channels, 0, scratch,
                         channels);
                for (int64_t p = 0; p < count; p++)
                    silu(out + p * factor * channels, scratch + p * channels, channels);
            }
}

/* Copy the output gradient of an input line: its `factor` lines and one on each side, with a zero pixel at each end. */
static void pad_slope(const Work *work, float *to, int64_t line, int64_t to_row)
{
    const int64_t factor = work->factor, wide = work->width * factor, tall = work->height * factor;
    const int64_t image = line / work->height, first = line % work->height * factor - 1;
    memset(to, 0, (size_t)((factor + 2) * to_row) * sizeof *to);
    for (int64_t i = 0; i < factor + 2; i++)
        if (first + i >= 0 && first + i < tall)
            memcpy(to + i * to_row + COLOURS, work->other + (image * tall + first + i) * wide * COLOURS,
                   (size_t)(wide * COLOURS) * sizeof *to);
}

static void NAMED(enlarge_part_backward)(const Work *work, int64_t part, int64_t parts, float *scratch)
{
    const int64_t width = work->width, channels = work->channels, factor = work->factor;
    const int64_t lines = work->images * work->height;
    const int64_t square = channels * channels, all = factor * factor, pad_row = (width * factor + 2) * COLOURS + 1;
    const int64_t block = PIXELS * channels;
    const Places places = places_of(work);
    float *pre = scratch, *act = pre + block, *d_pre = act + block, *values = d_pre + block;
    float *padded = values + PIXELS * TAIL, *sums = work->sums + part * work->size;
    float *d_bias = sums + all * square, *d_tail = d_bias + all * channels;

    memset(values, 0, PIXELS * TAIL * sizeof *values);
    for (int64_t line = lines * part / parts; line < lines * (part + 1) / parts; line++) {
        if (work->tail_bias)
            pad_slope(work, padded, line, pad_row);
        for (int64_t start = 0; start < width; start += PIXELS)
            for (int64_t place = 0; place < all; place++) {
                const int64_t count = least(PIXELS, width - start), row = place / factor, column = place % factor;
                const float *x = work->x + (line * width + start) * channels, *slope = d_pre;
                int64_t slope_row = channels;
                multiply(count, channels, channels, x, channels, 1, places.in + place * square, channels,
                         places.bias + place * channels, 0, pre, channels);
                if (work->tail_bias) {
                    for (int64_t p = 0; p < count; p++)
                        for (int64_t i = 0; i < 3; i++)
                            for (int64_t j = 0; j < 3; j++) {
                                const int64_t at = (start + p) * factor + column + 2 - j;
                                const Four value = load_four(padded + (row + 2 - i) * pad_row + at * COLOURS);
                                memcpy(values + p * TAIL + (i * 3 + j) * COLOURS, &value, sizeof value);
                            }
                    multiply(count, channels, TAPS * COLOURS, values, TAIL, 1, places.tail_back, channels, NULL, 0,
                             d_pre, channels);
                } else {
                    slope = work->other + (((line * factor + row) * width + start) * factor + column) * channels;
                    slope_row = factor * channels;
                }
                silu_backward(act, d_pre, slope, slope_row, pre, count, channels);
                if (work->tail_bias)
                    multiply(channels, TAIL, count, act, 1, channels, values, TAIL, NULL, 1, d_tail, TAIL);
                multiply(count, channels, channels, d_pre, channels, 1, places.back + place * square, channels, NULL,
                         place > 0, work->out + (line * width + start) * channels, channels);
                multiply(channels, channels, count, d_pre, 1, channels, x, channels, NULL, 1, sums + place * square,
                         channels);
                add_rows(d_bias + place * channels, d_pre, count, channels);
            }
    }
}

/* ---- Gradients of the weights of depth-wise convolutions ---- */

/* Correlate a line of the gradient and a line of the input, for 2 * LANES channels; `sums` is a row of the weights. */
INLINE void correlate(float *sums, const float *x, const float *slope, int64_t width, int64_t channels, int kernel)
{
    const int64_t reach = kernel / 2;
    V sum[7][2];
#pragma GCC unroll 7
    for (int k = 0; k < kernel; k++)
        for (int v = 0; v < 2; v++)
            sum[k][v] = load(sums + k * channels + v * LANES);
    for (int64_t i = reach; i < width - reach; i++) {
        const V low = load(slope + i * channels), high = load(slope + i * channels + LANES);
#pragma GCC unroll 7
        for (int k = 0; k < kernel; k++) {
            const float *at = x + (i + k - reach) * channels;
            sum[k][0] += low * load(at);
            sum[k][1] += high * load(at + LANES);
        }
    }
#pragma GCC unroll 7
    for (int k = 0; k < kernel; k++)
        for (int v = 0; v < 2; v++)
            store(sums + k * channels + v * LANES, sum[k][v]);
    for (int64_t i = 0; i < width; i++) { /* the ends, where the convolution reaches beyond the line */
        if (i == reach && width - reach > i)
            i = width - reach;
        for (int64_t k = 0; k < kernel; k++)
            if (i + k - reach >= 0 && i + k - reach < width)
                for (int64_t v = 0; v < 2 * LANES; v += LANES)
                    store(sums + k * channels + v, load(sums + k * channels + v) +
                                                       load(slope + i * channels + v) *
                                                           load(x + (i + k - reach) * channels + v));
    }
}

static void NAMED(depthwise_part)(const Work *work, int64_t part, int64_t parts, float *scratch)
{
    const int64_t width = work->width, height = work->height, channels = work->channels, kernel = work->kernel;
    const int64_t lines = work->images * height;
    float *sums = work->sums + part * work->size;
    (void)scratch;
    for (int64_t line = lines * part / parts; line < lines * (part + 1) / parts; line++) {
        const float *slope = work->other + line * width * channels;
        add_rows(sums + kernel * kernel * channels, slope, width, channels);
        for (int64_t c = 0; c < channels; c += 2 * LANES)
            for (int64_t k = 0; k < kernel; k++) {
                const int64_t y = line % height + k - kernel / 2;
                if (y < 0 || y >= height)
                    continue;
                const float *x = work->x + (line / height * height + y) * width * channels + c;
                float *row = sums + k * kernel * channels + c;
                if (kernel == 7)
                    correlate(row, x, slope + c, width, channels, 7);
                else if (kernel == 5)
                    correlate(row, x, slope + c, width, channels, 5);
                else
                    correlate(row, x, slope + c, width, channels, 3);
            }
    }
}

#undef load_four
#undef load
#undef store
#undef splat
#undef least
#undef total
#undef choose
#undef sigmoid
#undef tile
#undef columns_of
#undef multiply
#undef add_rows
#undef silu_backward
#undef silu
#undef reorder
#undef order_back
#undef mix_of
#undef normalise
#undef mix_block_backward
#undef mix_block
#undef places_of
#undef tail_values
#undef pad_slope
#undef correlate
#undef V
#undef I
#undef LOW
#undef HIGH
#undef FIRST
#undef SECOND
