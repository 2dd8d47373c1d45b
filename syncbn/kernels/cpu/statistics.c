/* The statistics of channels, between the passes over x. Compiled for the plainest processor of a kind and by one
thread, so that ranks on different machines have the same bits in their running buffers. */

#include "cpu.h"

#include <math.h>
#include <string.h>

static float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static float from_float16(uint16_t half) {
    /* As a float its exponent is 112 too small */
    float magnitude = from_bits((uint32_t)(half & 0x7fff) << 13) * 0x1p112f;
    uint32_t bits = to_bits(magnitude) | (magnitude >= 65536.0f ? 0x7f800000u : 0);
    return from_bits(bits | (uint32_t)(half & 0x8000) << 16);
}

/* The float nearest to a double, to odd: so that rounding it again to a half errs no more than rounding once. */
static uint32_t to_odd(double value) {
    float nearest = (float)value;
    uint32_t bits = to_bits(nearest);
    if ((double)nearest == value || isnan(value) || isinf(nearest)) return bits;
    if (fabs((double)nearest) > fabs(value)) bits--;
    return bits | 1;
}

static uint16_t to_float16(double value) {
    uint32_t bits = to_odd(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00);
    if (magnitude >= 0x47800000u) return (uint16_t)(sign | 0x7c00);
    if (magnitude < 0x38800000u) return (uint16_t)(sign | (to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f)));
    return (uint16_t)(sign | (magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

static uint16_t to_bfloat16(double value) {
    uint32_t bits = to_odd(value);
    if (isnan(value)) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static double get(const void *data, int64_t dtype, int64_t i) {
    switch (dtype) {
    case FLOAT32: return ((const float *)data)[i];
    case FLOAT64: return ((const double *)data)[i];
    case BFLOAT16: return from_bits((uint32_t)((const uint16_t *)data)[i] << 16);
    default: return from_float16(((const uint16_t *)data)[i]);
    }
}

static void put(void *data, int64_t dtype, int64_t i, double value) {
    switch (dtype) {
    case FLOAT32: ((float *)data)[i] = (float)value; break;
    case FLOAT64: ((double *)data)[i] = value; break;
    case BFLOAT16: ((uint16_t *)data)[i] = to_bfloat16(value); break;
    default: ((uint16_t *)data)[i] = to_float16(value);
    }
}

static double at_least_one(double count) { return count < 1 ? 1 : count; }

/* The row that rows [count, 2C + 1] are together, as moments.merge does it. between: [C + 1] what differs between rows
   and how many of them hold a value, or NULL. */
void merge(const double *rows, int64_t count, int64_t channels, double *merged, double *between) {
    const int64_t width = 2 * channels + 1;
    double *mean = merged, *m2 = merged + channels, values = 0, holding = 0;
    if (count == 1 && !between) {
        if (merged != rows) memcpy(merged, rows, width * sizeof *merged);
        return;
    }
    memset(merged, 0, width * sizeof *merged);
    for (int64_t r = 0; r < count; r++) {
        const double *row = rows + r * width, n = row[2 * channels];
        values += n;
        holding += n > 0;
        for (int64_t c = 0; c < channels; c++) mean[c] += n * row[c];
    }
    for (int64_t c = 0; c < channels; c++) mean[c] /= at_least_one(values);
    if (between) memset(between, 0, channels * sizeof *between);
    for (int64_t r = 0; r < count; r++) {
        const double *row = rows + r * width, n = row[2 * channels];
        for (int64_t c = 0; c < channels; c++) {
            const double apart = n * (row[c] - mean[c]) * (row[c] - mean[c]);
            m2[c] += row[channels + c] + apart;
            if (between) between[c] += apart;
        }
    }
    merged[2 * channels] = values;
    if (between) between[channels] = holding;
}

/* As moments.to_message: sums, which add up over ranks. */
void to_message(double *row, int64_t channels) {
    for (int64_t c = 0; c < channels; c++) {
        const double mean = row[c], total = row[2 * channels] * mean;
        row[c] = total;
        row[channels + c] += total * mean;
    }
}

static void from_message(const double *message, int64_t channels, double *row) {
    const double count = message[2 * channels];
    for (int64_t c = 0; c < channels; c++) {
        const double mean = message[c] / at_least_one(count);
        const double m2 = message[channels + c] - message[c] * mean;
        row[c] = mean;
        /* Not fmax, which hides NaN */
        row[channels + c] = m2 < 0 ? 0 : m2;
    }
    row[2 * channels] = count;
}

/* stats [3C + 1] of what the ranks shared, which may lie at their beginning. */
void to_stats(const normalize_call *call) {
    const int64_t channels = call->x_layout.channels;
    double *stats = call->stats;
    if (call->rows == 0)
        from_message(call->shared, channels, stats);
    else
        merge(call->shared, call->rows, channels, stats, NULL);
    const double count = at_least_one(stats[2 * channels]);
    for (int64_t c = 0; c < channels; c++)
        stats[2 * channels + 1 + c] = 1 / sqrt(stats[channels + c] / count + call->affine.eps);
}

static void move(const vector *buffer, int64_t c, double value, double step) {
    const double old = get(buffer->data, buffer->dtype, c), way = value - old;
    /* From the nearer end, so that a step of 1 arrives exactly */
    put(buffer->data, buffer->dtype, c, step < 0.5 ? old + step * way : value - (1 - step) * way);
}

/* As moments.update_running. */
void move_running(const running *to, const double *stats, int64_t channels) {
    const double count = stats[2 * channels];
    if (!(count > 0)) return;
    const double batches = (double)++*to->batches;
    const double step = to->cumulative ? 1 / at_least_one(batches) : to->momentum;
    for (int64_t c = 0; c < channels; c++) {
        move(&to->mean, c, stats[c], step);
        move(&to->var, c, stats[channels + c] / at_least_one(count - 1), step);
    }
}

/* Mean and var one behind the other, as they are. */
void copy_running(void *before, const running *from, int64_t channels) {
    const size_t size = channels * (from->mean.dtype == FLOAT64 ? sizeof(double) : sizeof(float));
    memcpy(before, from->mean.data, size);
    memcpy((char *)before + size, from->var.data, size);
}

/* All of them, each loop without a question of dtype. */
static void read_all(double *to, const vector *from, double otherwise, int64_t channels) {
    if (!from->data)
        for (int64_t c = 0; c < channels; c++) to[c] = otherwise;
    else if (from->dtype == FLOAT32)
        for (int64_t c = 0; c < channels; c++) to[c] = ((const float *)from->data)[c];
    else
        for (int64_t c = 0; c < channels; c++) to[c] = get(from->data, from->dtype, c);
}

static double as_arithmetic(double value, bool wide) { return wide ? value : (float)value; }

/* In the dtype of the arithmetic, and again for each of the places that are folded into one row. */
static void write_all(void *to, const double *from, const plan *cut) {
    const int64_t channels = cut->x.channels;
    const bool wide = cut->x.dtype == FLOAT64;
    const size_t size = channels * (wide ? sizeof(double) : sizeof(float));
    if (wide)
        memcpy(to, from, size);
    else
        for (int64_t c = 0; c < channels; c++) ((float *)to)[c] = (float)from[c];
    for (int64_t f = 1; f < cut->fold; f++) memcpy((char *)to + f * size, to, size);
}

void affine_coefficients(coefficients *of, const plan *cut, const double *stats, const affine *map) {
    const int64_t channels = cut->x.channels;
    const bool wide = cut->x.dtype == FLOAT64;
    const double *invstd = stats + 2 * channels + 1;
    double *scale = of->scratch, *shift = of->scratch + channels;
    read_all(scale, &map->weight, 1, channels);
    read_all(shift, &map->bias, 0, channels);
    for (int64_t c = 0; c < channels; c++) {
        scale[c] *= invstd[c];
        shift[c] += (as_arithmetic(stats[c], wide) - stats[c]) * scale[c];
    }
    write_all(of->pivot, stats, cut);
    write_all(of->scale, scale, cut);
    write_all(of->shift, shift, cut);
}

void input_coefficients(coefficients *of, const plan *cut, const double *stats, const double *sums) {
    const int64_t channels = cut->x.channels;
    const bool wide = cut->x.dtype == FLOAT64;
    const double *invstd = stats + 2 * channels + 1;
    const double share = 1 / at_least_one(stats[2 * channels]);
    double *slope = of->scratch, *offset = of->scratch + channels;
    for (int64_t c = 0; c < channels; c++) {
        slope[c] = -invstd[c] * (sums[channels + c] * share);
        offset[c] = (as_arithmetic(stats[c], wide) - stats[c]) * slope[c] - sums[c] * share;
    }
    write_all(of->slope, slope, cut);
    write_all(of->offset, offset, cut);
}

static void write_gradient(void *to, int64_t dtype, const double *from, int64_t channels) {
    if (dtype == FLOAT32)
        for (int64_t c = 0; c < channels; c++) ((float *)to)[c] = (float)from[c];
    else
        for (int64_t c = 0; c < channels; c++) put(to, dtype, c, from[c]);
}

/* [sum g | sum g * xhat] of partials [count, 2C], which are about the pivot, and the parameters' gradients. */
void add_partials(const grad_sums_call *call, const double *partials, int64_t count) {
    const int64_t channels = call->x_layout.channels, width = 2 * channels;
    const bool wide = call->x_layout.dtype == FLOAT64;
    const double *stats = call->stats;
    double *sums = call->packed;
    memset(sums, 0, width * sizeof *sums);
    for (int64_t r = 0; r < count; r++)
        for (int64_t c = 0; c < width; c++) sums[c] += partials[r * width + c];
    for (int64_t c = 0; c < channels; c++) {
        const double behind = as_arithmetic(stats[c], wide) - stats[c];
        sums[channels + c] = (sums[channels + c] + behind * sums[c]) * stats[2 * channels + 1 + c];
    }
    if (call->dweight) write_gradient(call->dweight, call->affine.weight.dtype, sums + channels, channels);
    if (call->dbias) write_gradient(call->dbias, call->affine.bias.dtype, sums, channels);
}
