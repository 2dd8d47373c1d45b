/* What Python hands to the passes, and what the passes hand each other.

Every record is packed by Python's `struct` from fields of 8 bytes, in this order: see __init__.py. A pointer is NULL
for what is not there. C is channels; places are the N * S elements of a channel, in that order. */

#ifndef SYNCBN_CPU_H
#define SYNCBN_CPU_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

_Static_assert(sizeof(void *) == 8, "records hold pointers and numbers of 8 bytes");

enum dtype { FLOAT32, FLOAT64, BFLOAT16, FLOAT16, DTYPES };

/* How x lies in memory, [images, channels, size] or [images, size, channels], and who shares the work. */
typedef struct {
    int64_t images, channels, size, channels_last, dtype, threads;
} layout;

/* One number for each channel, in a dtype of its own. */
typedef struct {
    void *data;
    int64_t dtype;
} vector;

typedef struct {
    vector weight, bias;
    int64_t relu;
    double eps;
} affine;

typedef struct {
    vector mean, var;
    int64_t *batches;
    int64_t cumulative;
    double momentum;
} running;

typedef struct {
    layout x_layout;
    const void *x;
    const uint8_t *mask; /* [N * S] */
    double *packed;      /* [2C + 1] */
    double *between;     /* [C + 1], if what differs between images is asked for */
    int64_t as_message;
} moments_call;

typedef struct {
    layout x_layout;
    const void *x, *residual;
    void *y;
    const double *shared; /* [2C + 1], or [rows, 2C + 1] */
    int64_t rows;         /* 0 for a message */
    double *stats;        /* [3C + 1] */
    affine affine;
    running running;
} normalize_call;

typedef struct {
    layout x_layout;
    const void *dy, *x, *y;
    void *g;
    const double *stats;
    double *packed; /* [2C] */
    void *dweight, *dbias;
    affine affine;
} grad_sums_call;

typedef struct {
    layout x_layout;
    const void *g, *x;
    const uint8_t *mask;
    void *dx;
    const double *stats, *sums;
    affine affine;
} grad_input_call;

typedef struct {
    int64_t channels;
    const double *stats;
    running running;
} update_running_call;

/* How a message is added up: share returns 0 once the sum of all ranks' rows [n] is in out, which may be row. NULL for a
   rank that is alone. */
typedef struct {
    int (*share)(void *box, const double *row, size_t n, double *out, int what);
    void *box;
} wire;

/* What an observer is told of a forward; all are NULL if there is none. */
typedef struct {
    double *packed;  /* [2C + 1] of this rank */
    double *between; /* [C + 1], or NULL */
    double *whole;   /* [2C + 1] the row of the whole batch */
    void *before;    /* [2C] mean and var of the running statistics before they move, in their dtype */
} seen;

typedef struct {
    layout x_layout;
    const void *x;
    const uint8_t *mask;
    const void *residual;
    void *y;
    double *stats; /* [3C + 1]; begins with the sum of what the ranks sent, if it came no further */
    int64_t as_message;
    affine affine;
    running running;
    wire wire;
    seen seen;
} forward_call;

typedef struct {
    layout x_layout;
    const void *dy, *x, *y;
    void *g;
    const uint8_t *mask;
    void *dx; /* NULL if nobody wants it */
    const double *stats;
    void *dweight, *dbias;
    affine affine;
    wire wire;
} backward_call;

/* What a call returns. Of a forward or backward that came no further than its message, UNFINISHED and what share
   returned. UNFIT: the whole batch is no number, as a peer refused, or one. */
enum { DONE, NO_MEMORY, UNFIT, UNFINISHED = 16 };

/* How the work on x is cut up; a function of its layout alone, so that any number of threads gives the same bits. */
typedef struct {
    layout x;
    bool rows;              /* whether the channels of a place lie side by side */
    int64_t fold;           /* places that are taken for one row of fold * C columns */
    int64_t places;         /* N * S */
    int64_t chunk, chunks;  /* places that a partial sum is of, and how many such there are */
    int64_t group, groups;  /* channels, or columns, of a task, and how many such there are */
    int64_t partials;       /* rows that all chunks leave */
    int64_t piece, pieces;  /* values that a task writes, whole rows where x is in rows, and how many such there are */
} plan;

/* Per channel, or column, in the arithmetic of the passes: y = (x - pivot) * scale + shift, and
   dx = (g + (x - pivot) * slope + offset) * scale. */
typedef struct {
    void *pivot, *scale, *shift, *slope, *offset;
    double *scratch; /* [2C] */
} coefficients;

/* What the tasks of a pass read. */
typedef struct {
    const plan *plan;
    const void *x, *other, *y;
    void *out;
    const uint8_t *mask;
    double *partials; /* [partials, 2C + 1] moments as rows, or [partials, 2C] sums */
    coefficients of;
    bool relu;
} pass;

typedef void (*task)(const pass *, int64_t);

/* The tasks of each pass in one dtype, for one kind of processor. */
typedef struct {
    task moments, normalize, grad_sums, grad_input;
} passes;

/* Columns of a task that adds up */
enum { COLUMNS = 256 };

/* passes.c */
const passes *passes_of(int64_t dtype);

/* statistics.c */
void merge(const double *rows, int64_t count, int64_t channels, double *merged, double *between);
void to_message(double *row, int64_t channels);
void to_stats(const normalize_call *call);
void move_running(const running *to, const double *stats, int64_t channels);
void copy_running(void *before, const running *from, int64_t channels);
void affine_coefficients(coefficients *of, const plan *cut, const double *stats, const affine *map);
void input_coefficients(coefficients *of, const plan *cut, const double *stats, const double *sums);
void add_partials(const grad_sums_call *call, const double *partials, int64_t count);

#endif
