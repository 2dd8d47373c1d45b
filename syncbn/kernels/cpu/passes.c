/* The passes over x for every dtype and every kind of processor, and which of them this processor takes. */

#include "cpu.h"

#include <string.h>

#define INLINE static inline __attribute__((always_inline))

/* For the preprocessor, which does not know enum dtype */
#define FLOAT32_ 0
#define FLOAT64_ 1
#define BFLOAT16_ 2
#define FLOAT16_ 3

/* Values, rows, of a block that float32 adds up; a row is of many channels, each of which is added to one by one */
enum { BLOCK = 2048, ROWS = 128 };
/* Of them, those that the pivot is the mean of: a sixteenth */
enum { PIVOT = BLOCK / 16, PIVOT_ROWS = ROWS / 16 };
/* Vectors of columns that registers hold, and rows that are written before the next of them: memory is read in order */
enum { VECTORS = 4, NEAR_ROWS = 8 };

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* The rows and columns of a task, in rows of width columns from start on; place and partial are those of the first. */
typedef struct {
    int64_t start, place, rows, width, column, end, partial;
} strip;

static strip strip_of(const plan *cut, int64_t task) {
    const int64_t chunk = task / cut->groups, group = task % cut->groups, row = chunk * cut->chunk;
    const int64_t folded = cut->places / cut->fold, channels = cut->x.channels;
    strip at = {.column = group * cut->group, .partial = chunk * cut->fold, .width = channels, .place = row};
    if (row < folded) {
        at.width *= cut->fold;
        at.rows = least(cut->chunk, folded - row);
        at.start = row * at.width;
    } else {
        /* The places that fold does not divide */
        at.rows = cut->places % cut->fold;
        at.start = folded * cut->fold * channels;
    }
    at.end = least(at.column + cut->group, at.width);
    return at;
}

/* How many places from first to end count. */
static int64_t count_of(const uint8_t *mask, int64_t first, int64_t end) {
    int64_t count = 0;
    if (!mask) return end - first;
    for (int64_t i = first; i < end; i++) count += mask[i] != 0;
    return count;
}

#define KIND any
#include "dtypes.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(ONE_KIND)
#define OF_KINDS
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define KIND v3
#include "dtypes.h"
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
#define KIND v4
#include "dtypes.h"
#pragma GCC pop_options
#endif

const passes *passes_of(int64_t dtype) {
#ifdef OF_KINDS
    if (__builtin_cpu_supports("x86-64-v4")) return passes_of_v4[dtype];
    if (__builtin_cpu_supports("x86-64-v3")) return passes_of_v3[dtype];
#endif
    return passes_of_any[dtype];
}

