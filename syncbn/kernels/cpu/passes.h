/* The passes over x in one dtype, for one kind of processor: see passes.c, which includes it for each.

Sums go in float32 over at most BLOCK values, in float64 beyond. Squares are about a pivot, the mean of the first of a
block's values: at least a sixteenth of them, so that no more than log10(16) digits cancel, for any data. */

#include "vectors.h"

/* Values of a block that its moments are of. */
typedef struct {
    double count, mean, m2;
} OF(moments);
#define MOMENTS OF(moments)

/* Chan, Golub & LeVeque 1979 */
INLINE MOMENTS OF(joined)(MOMENTS a, MOMENTS b) {
    if (b.count == 0) return a;
    const double count = a.count + b.count, share = b.count / count, apart = b.mean - a.mean;
    return (MOMENTS){count, a.mean + apart * share, a.m2 + b.m2 + apart * apart * a.count * share};
}

/* Where the values of a channel lie side by side: in planes. */

/* A piece of a plane: where it starts in x, its first place, and how long it is. */
typedef struct {
    int64_t start, place, length;
} OF(piece);
#define PIECE OF(piece)

INLINE PIECE OF(first_piece)(const plan *cut, int64_t c, int64_t place, int64_t end) {
    const int64_t size = cut->x.size, image = place / size, within = place - image * size;
    return (PIECE){(image * cut->x.channels + c) * size + within, place, least(size - within, end - place)};
}

/* The piece behind, in the next image; of length 0 if the last ended at the place end. */
INLINE PIECE OF(next_piece)(const plan *cut, PIECE last, int64_t end) {
    const int64_t size = cut->x.size, place = last.place + last.length;
    return (PIECE){last.start + last.length + (cut->x.channels - 1) * size, place, least(size, end - place)};
}

typedef struct {
    VEC total, squares, count;
} OF(lane_sums);
#define LANE_SUMS OF(lane_sums)

/* Adds the last `fresh` of count values from i on, less a pivot; of masked places those that count. */
INLINE void OF(add_values)(LANE_SUMS *to, const pass *this, PIECE at, int64_t i, VEC pivot, int64_t count,
                           int64_t fresh) {
    VEC apart = OF(load_up_to)((const STORED *)this->x + at.start + i, count) - pivot;
    BITS here = OF(last_lanes)(fresh + LANES - count);
    if (count < LANES) here = ~OF(last_lanes)(LANES - count);
    if (this->mask) {
        here &= OF(lanes_of)(this->mask + at.place + i, count);
        to->count += OF(where)(here, OF(broadcast)(1));
    }
    if (this->mask || fresh < LANES) apart = OF(where)(here, apart);
    to->total += apart;
    to->squares += apart * apart;
}

/* Sums over the values of channel c from place to end, less a pivot. */
INLINE LANE_SUMS OF(plane_sums)(const pass *this, int64_t c, int64_t place, int64_t end, ARITHMETIC about) {
    const VEC pivot = OF(broadcast)(about);
    LANE_SUMS even = {{0}, {0}, {0}}, odd = even;
    PIECE at = OF(first_piece)(this->plan, c, place, end);
    for (; at.length > 0; at = OF(next_piece)(this->plan, at, end)) {
        int64_t i = 0;
        for (; i + 2 * LANES <= at.length; i += 2 * LANES) {
            OF(add_values)(&even, this, at, i, pivot, LANES, LANES);
            OF(add_values)(&odd, this, at, i + LANES, pivot, LANES, LANES);
        }
        for (; i + LANES <= at.length; i += LANES) OF(add_values)(&even, this, at, i, pivot, LANES, LANES);
        const int64_t left = at.length - i;
        if (left > 0 && i > 0)
            OF(add_values)(&odd, this, at, at.length - LANES, pivot, LANES, left);
        else if (left > 0)
            OF(add_values)(&odd, this, at, i, pivot, left, left);
    }
    return (LANE_SUMS){even.total + odd.total, even.squares + odd.squares, even.count + odd.count};
}

INLINE MOMENTS OF(plane_moments)(const pass *this, int64_t c, int64_t place, int64_t end) {
    const int64_t values = end - place, near = values / 16 > LANES ? values / 16 : least(values, LANES);
    /* Of a masked block the first values may all be masked */
    const LANE_SUMS first = OF(plane_sums)(this, c, place, this->mask ? end : place + near, 0);
    const double count = this->mask ? OF(sum)(first.count) : (double)values;
    if (count == 0) return (MOMENTS){0, 0, 0};
    const ARITHMETIC pivot = (ARITHMETIC)(OF(sum)(first.total) / (this->mask ? count : (double)near));
    const LANE_SUMS sums = OF(plane_sums)(this, c, place, end, pivot);
    const double offset = OF(sum)(sums.total) / count, m2 = OF(sum)(sums.squares) - count * offset * offset;
    return (MOMENTS){count, pivot + offset, m2 < 0 ? 0 : m2};
}

static void OF(moments_of_planes)(const pass *this, int64_t task) {
    const plan *cut = this->plan;
    const int64_t channels = cut->x.channels, chunk = task / cut->groups, group = task % cut->groups;
    const int64_t begin = chunk * cut->chunk, end = least(begin + cut->chunk, cut->places);
    double *row = this->partials + chunk * (2 * channels + 1);
    for (int64_t c = group * cut->group; c < least((group + 1) * cut->group, channels); c++) {
        MOMENTS all = {0, 0, 0};
        for (int64_t place = begin; place < end; place += BLOCK)
            all = OF(joined)(all, OF(plane_moments)(this, c, place, least(place + BLOCK, end)));
        row[c] = all.mean;
        row[channels + c] = all.m2;
        if (c == 0) row[2 * channels] = all.count;
    }
}

/* y before the relu; the same arithmetic forward and backward, so that both find the same sign. */
INLINE VEC OF(affine)(VEC x, VEC pivot, VEC scale, VEC shift) { return (x - pivot) * scale + shift; }

/* v where y > 0 or is no number. */
INLINE VEC OF(past_relu)(VEC v, VEC y) { return OF(where)(~(y <= 0), v); }

/* What a pass knows of the channel that it is at, or of the channels side by side. */
typedef struct {
    VEC pivot, scale, shift, slope, offset;
} OF(known);
#define KNOWN OF(known)

INLINE VEC OF(coefficient)(const void *of, int64_t at, bool side_by_side, int64_t count) {
    const ARITHMETIC *values = (const ARITHMETIC *)of + at;
    if (!side_by_side) return OF(broadcast)(*values);
    VEC v = {0};
    if (count == LANES)
        memcpy(&v, values, sizeof v);
    else
        for (int64_t i = 0; i < count; i++) v[i] = values[i];
    return v;
}

INLINE KNOWN OF(known_at)(const pass *this, int64_t at, bool side_by_side, int64_t count) {
    const coefficients *of = &this->of;
    return (KNOWN){
        OF(coefficient)(of->pivot, at, side_by_side, count), OF(coefficient)(of->scale, at, side_by_side, count),
        OF(coefficient)(of->shift, at, side_by_side, count), OF(coefficient)(of->slope, at, side_by_side, count),
        OF(coefficient)(of->offset, at, side_by_side, count),
    };
}

/* The gradient past the relu, of values from i on; kept in out if y is what tells of the relu. */
INLINE VEC OF(past_gradient)(const pass *this, int64_t i, VEC x, const KNOWN *at, int64_t count) {
    const VEC g = OF(load_up_to)((const STORED *)this->other + i, count);
    if (!this->relu) return g;
    if (!this->y) return OF(past_relu)(g, OF(affine)(x, at->pivot, at->scale, at->shift));
    const VEC past = OF(past_relu)(g, OF(load_up_to)((const STORED *)this->y + i, count));
    OF(store_up_to)((STORED *)this->out + i, past, count);
    return past;
}

/* Adds what the last `fresh` of count values from i on contribute to both sums. */
INLINE void OF(add_gradient)(const pass *this, int64_t i, const KNOWN *at, int64_t count, int64_t fresh, VEC *total,
                             VEC *dot) {
    const VEC x = OF(load_up_to)((const STORED *)this->x + i, count);
    VEC g = OF(past_gradient)(this, i, x, at, count), product = g * (x - at->pivot);
    if (count == LANES && fresh < LANES) {
        g = OF(where)(OF(last_lanes)(fresh), g);
        product = OF(where)(OF(last_lanes)(fresh), product);
    }
    if (count < LANES) product = OF(where)(~OF(last_lanes)(LANES - count), product);
    *total += g;
    *dot += product;
}

typedef struct {
    double total, dot;
} OF(gradient_sums);

/* Sums over the values of channel c from place to end. */
INLINE OF(gradient_sums) OF(plane_gradients)(const pass *this, int64_t c, int64_t place, int64_t end,
                                             const KNOWN *of) {
    VEC total = {0}, dot = {0}, more = {0}, more_dot = {0};
    PIECE at = OF(first_piece)(this->plan, c, place, end);
    for (; at.length > 0; at = OF(next_piece)(this->plan, at, end)) {
        int64_t i = 0;
        for (; i + 2 * LANES <= at.length; i += 2 * LANES) {
            OF(add_gradient)(this, at.start + i, of, LANES, LANES, &total, &dot);
            OF(add_gradient)(this, at.start + i + LANES, of, LANES, LANES, &more, &more_dot);
        }
        for (; i + LANES <= at.length; i += LANES)
            OF(add_gradient)(this, at.start + i, of, LANES, LANES, &total, &dot);
        const int64_t left = at.length - i;
        if (left > 0 && i > 0)
            OF(add_gradient)(this, at.start + at.length - LANES, of, LANES, left, &more, &more_dot);
        else if (left > 0)
            OF(add_gradient)(this, at.start + i, of, left, left, &more, &more_dot);
    }
    return (OF(gradient_sums)){OF(sum)(total + more), OF(sum)(dot + more_dot)};
}

static void OF(gradients_of_planes)(const pass *this, int64_t task) {
    const plan *cut = this->plan;
    const int64_t channels = cut->x.channels, chunk = task / cut->groups, group = task % cut->groups;
    const int64_t begin = chunk * cut->chunk, end = least(begin + cut->chunk, cut->places);
    double *row = this->partials + chunk * 2 * channels;
    for (int64_t c = group * cut->group; c < least((group + 1) * cut->group, channels); c++) {
        const KNOWN at = OF(known_at)(this, c, false, LANES);
        row[c] = row[channels + c] = 0;
        for (int64_t place = begin; place < end; place += BLOCK) {
            const OF(gradient_sums) sums = OF(plane_gradients)(this, c, place, least(place + BLOCK, end), &at);
            row[c] += sums.total;
            row[channels + c] += sums.dot;
        }
    }
}

/* Where the channels of a place lie side by side: in rows, of columns. */

/* What is added up over a strip: mean and m2 of the values seen, or sum g and sum g * (x - pivot). Whole vectors are
   joined, so they may reach beyond the last column. */
typedef struct {
    double seen, first[COLUMNS + LANES], second[COLUMNS + LANES];
} OF(strip_sums);
#define STRIP_SUMS OF(strip_sums)

INLINE WIDE OF(load_wide)(const double *from) {
    WIDE v;
    memcpy(&v, from, sizeof v);
    return v;
}

INLINE void OF(store_wide)(double *to, WIDE v) { memcpy(to, &v, sizeof v); }

/* A tile is some rows of so many vectors of columns from one on; only if it is one vector may it have fewer columns
   than lanes. */
typedef struct {
    int64_t first, end, column, columns;
    int vectors;
    double counted;
} OF(tile);
#define TILE OF(tile)

INLINE bool OF(counts)(const pass *this, const strip *at, int64_t row) {
    return !this->mask || this->mask[at->place + row];
}

INLINE void OF(join_moments)(const pass *this, const strip *at, TILE tile, STRIP_SUMS *to) {
    const STORED *x = (const STORED *)this->x + at->start + tile.column;
    VEC pivot[VECTORS] = {{0}}, total[VECTORS] = {{0}}, squares[VECTORS] = {{0}};
    /* Of masked rows the first may all be masked */
    const int64_t near = this->mask ? tile.end : least(tile.first + PIVOT_ROWS, tile.end);
    for (int64_t r = tile.first; r < near; r++)
        for (int v = 0; OF(counts)(this, at, r) && v < tile.vectors; v++)
            pivot[v] += OF(load_up_to)(x + r * at->width + v * LANES, tile.columns);
    const ARITHMETIC part = 1 / (ARITHMETIC)(this->mask ? tile.counted : (double)(near - tile.first));
    for (int v = 0; v < tile.vectors; v++) pivot[v] *= part;
    for (int64_t r = tile.first; r < tile.end; r++)
        for (int v = 0; OF(counts)(this, at, r) && v < tile.vectors; v++) {
            const VEC apart = OF(load_up_to)(x + r * at->width + v * LANES, tile.columns) - pivot[v];
            total[v] += apart;
            squares[v] += apart * apart;
        }
    const double share = tile.counted / (to->seen + tile.counted);
    for (int v = 0; v < tile.vectors; v++) {
        double *mean = to->first + tile.column - at->column + v * LANES;
        double *m2 = to->second + tile.column - at->column + v * LANES;
        const WIDE sum = __builtin_convertvector(total[v], WIDE), offset = sum / tile.counted;
        const WIDE within = __builtin_convertvector(squares[v], WIDE) - sum * offset;
        const WIDE apart = __builtin_convertvector(pivot[v], WIDE) + offset - OF(load_wide)(mean);
        const WIDE between = apart * apart * (to->seen * share);
        OF(store_wide)(mean, OF(load_wide)(mean) + apart * share);
        OF(store_wide)(m2, OF(load_wide)(m2) + OF(not_negative)(within) + between);
    }
}

INLINE void OF(join_gradients)(const pass *this, const strip *at, TILE tile, STRIP_SUMS *to) {
    VEC total[VECTORS] = {{0}}, dot[VECTORS] = {{0}};
    KNOWN known[VECTORS];
    for (int v = 0; v < tile.vectors; v++)
        known[v] = OF(known_at)(this, tile.column + v * LANES, true, tile.columns);
    for (int64_t r = tile.first; r < tile.end; r++)
        for (int v = 0; v < tile.vectors; v++) {
            const int64_t i = at->start + r * at->width + tile.column + v * LANES;
            OF(add_gradient)(this, i, &known[v], tile.columns, tile.columns, &total[v], &dot[v]);
        }
    for (int v = 0; v < tile.vectors; v++) {
        double *sum = to->first + tile.column - at->column + v * LANES;
        double *sum_dot = to->second + tile.column - at->column + v * LANES;
        OF(store_wide)(sum, OF(load_wide)(sum) + __builtin_convertvector(total[v], WIDE));
        OF(store_wide)(sum_dot, OF(load_wide)(sum_dot) + __builtin_convertvector(dot[v], WIDE));
    }
}

INLINE void OF(join_tile)(const pass *this, const strip *at, TILE tile, STRIP_SUMS *to, bool backward) {
    if (backward)
        OF(join_gradients)(this, at, tile, to);
    else
        OF(join_moments)(this, at, tile, to);
}

INLINE void OF(join_rows)(const pass *this, const strip *at, int64_t first, STRIP_SUMS *to, bool backward) {
    const int64_t end = least(first + ROWS, at->rows);
    const double counted = (double)count_of(this->mask, at->place + first, at->place + end);
    if (counted == 0) return;
    int64_t column = at->column;
    for (; column + VECTORS * LANES <= at->end; column += VECTORS * LANES)
        OF(join_tile)(this, at, (TILE){first, end, column, LANES, VECTORS, counted}, to, backward);
    for (; column + LANES <= at->end; column += LANES)
        OF(join_tile)(this, at, (TILE){first, end, column, LANES, 1, counted}, to, backward);
    if (column < at->end)
        OF(join_tile)(this, at, (TILE){first, end, column, at->end - column, 1, counted}, to, backward);
    to->seen += counted;
}

/* Leaves a row, or a row for each of the places that were folded into one. */
INLINE void OF(add_up_strip)(const pass *this, int64_t task, bool backward) {
    const strip at = strip_of(this->plan, task);
    STRIP_SUMS sums;
    memset(&sums, 0, sizeof sums);
    for (int64_t first = 0; first < at.rows; first += ROWS) OF(join_rows)(this, &at, first, &sums, backward);
    const int64_t channels = this->plan->x.channels, width = 2 * channels + !backward;
    for (int64_t column = at.column; column < at.end; column++) {
        const int64_t c = column % channels;
        double *row = this->partials + (at.partial + column / channels) * width;
        row[c] = sums.first[column - at.column];
        row[channels + c] = sums.second[column - at.column];
        if (!backward && c == 0) row[2 * channels] = sums.seen;
    }
}

/* What is written value by value, wherever it lies. */

INLINE void OF(normalize_at)(const pass *this, int64_t i, const KNOWN *at, int64_t count) {
    const VEC x = OF(load_up_to)((const STORED *)this->x + i, count);
    VEC y = OF(affine)(x, at->pivot, at->scale, at->shift);
    if (this->other) y += OF(load_up_to)((const STORED *)this->other + i, count);
    if (this->relu) y = OF(past_relu)(y, y);
    OF(store_up_to)((STORED *)this->out + i, y, count);
}

INLINE void OF(grad_input_at)(const pass *this, int64_t i, const KNOWN *at, int64_t place, bool side_by_side,
                              int64_t count) {
    const VEC x = OF(load_up_to)((const STORED *)this->x + i, count);
    VEC g = OF(load_up_to)((const STORED *)this->other + i, count);
    if (this->relu) g = OF(past_relu)(g, OF(affine)(x, at->pivot, at->scale, at->shift));
    VEC through_moments = (x - at->pivot) * at->slope + at->offset;
    if (this->mask) {
        const uint8_t *mask = this->mask + place;
        const BITS here = side_by_side ? (BITS){0} - (*mask != 0) : OF(lanes_of)(mask, count);
        through_moments = OF(where)(here, through_moments);
    }
    OF(store_up_to)((STORED *)this->out + i, (g + through_moments) * at->scale, count);
}

INLINE void OF(write_at)(const pass *this, bool forward, int64_t i, const KNOWN *at, int64_t place, bool side_by_side,
                         int64_t count) {
    if (forward)
        OF(normalize_at)(this, i, at, count);
    else
        OF(grad_input_at)(this, i, at, place, side_by_side, count);
}

/* Values from start to end of a plane, or of a row that begins at first. */
INLINE void OF(write_run)(const pass *this, bool forward, bool side_by_side, int64_t c, int64_t place, int64_t first,
                          int64_t start, int64_t end) {
    KNOWN at = OF(known_at)(this, c, false, LANES);
    int64_t i = start;
    for (; i + LANES <= end; i += LANES) {
        if (side_by_side) at = OF(known_at)(this, i - first, true, LANES);
        OF(write_at)(this, forward, i, &at, side_by_side ? place : place + i - first, side_by_side, LANES);
    }
    if (i == end) return;
    /* The last vector covers values that were written before, with the same */
    const bool whole = end - start >= LANES;
    if (whole) i = end - LANES;
    if (side_by_side) at = OF(known_at)(this, i - first, true, whole ? LANES : end - i);
    place += side_by_side ? 0 : i - first;
    if (whole)
        OF(write_at)(this, forward, i, &at, place, side_by_side, LANES);
    else
        OF(write_at)(this, forward, i, &at, place, side_by_side, end - i);
}

INLINE void OF(write_planes)(const pass *this, bool forward, int64_t task) {
    const plan *cut = this->plan;
    const int64_t channels = cut->x.channels, size = cut->x.size;
    const int64_t begin = task * cut->piece, end = least(begin + cut->piece, cut->places * channels);
    int64_t plane = begin / size, c = plane % channels, image = plane / channels;
    for (int64_t i = begin; i < end; plane++) {
        const int64_t next = least((plane + 1) * size, end);
        OF(write_run)(this, forward, false, c, image * size, plane * size, i, next);
        i = next;
        if (++c == channels) {
            c = 0;
            image++;
        }
    }
}

/* Some vectors of columns, whose coefficients stay in registers. */
INLINE void OF(write_tile)(const pass *this, bool forward, int64_t width, int64_t column, int64_t row, int64_t end) {
    KNOWN known[VECTORS];
    for (int v = 0; v < VECTORS; v++) known[v] = OF(known_at)(this, column + v * LANES, true, LANES);
    for (; row < end; row++)
        for (int v = 0; v < VECTORS; v++)
            OF(write_at)(this, forward, row * width + column + v * LANES, &known[v], row, true, LANES);
}

INLINE void OF(write_rows)(const pass *this, bool forward, int64_t task) {
    const plan *cut = this->plan;
    const int64_t width = cut->fold * cut->x.channels, values = cut->places * cut->x.channels;
    const int64_t begin = task * cut->piece / width, end = least(begin + cut->piece / width, values / width);
    for (int64_t row = begin; row < end; row += NEAR_ROWS) {
        const int64_t stop = least(row + NEAR_ROWS, end);
        int64_t column = 0;
        for (; column + VECTORS * LANES <= width; column += VECTORS * LANES)
            OF(write_tile)(this, forward, width, column, row, stop);
        for (int64_t r = row; column < width && r < stop; r++)
            OF(write_run)(this, forward, true, 0, r, r * width, r * width + column, (r + 1) * width);
    }
    /* The places that fold does not divide */
    const int64_t rest = values / width * width;
    if ((task + 1) * cut->piece > rest && rest < values)
        OF(write_run)(this, forward, true, 0, values / width, rest, rest, values);
}

INLINE void OF(write)(const pass *this, bool forward, int64_t task) {
    if (this->plan->rows)
        OF(write_rows)(this, forward, task);
    else
        OF(write_planes)(this, forward, task);
}

static void OF(moments_task)(const pass *this, int64_t task) {
    if (this->plan->rows)
        OF(add_up_strip)(this, task, false);
    else
        OF(moments_of_planes)(this, task);
}

static void OF(grad_sums_task)(const pass *this, int64_t task) {
    if (this->plan->rows)
        OF(add_up_strip)(this, task, true);
    else
        OF(gradients_of_planes)(this, task);
}

static void OF(normalize_task)(const pass *this, int64_t task) { OF(write)(this, true, task); }

static void OF(grad_input_task)(const pass *this, int64_t task) { OF(write)(this, false, task); }

static const passes OF(passes) = {OF(moments_task), OF(normalize_task), OF(grad_sums_task), OF(grad_input_task)};
