/* What Python calls: each pass is cut up into tasks, which threads share, and what they leave is put together. */

#include "cpu.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define EXPORTED __attribute__((visibility("default")))

/* Columns that rows are folded to, so that few channels fill vectors too; and the most of them */
enum { LANES_OF_FLOAT32 = 16, MOST_COLUMNS = 512 };
/* Places that a partial sum is of, in planes and in rows; values that a task adds up, at least, and writes */
enum { CHUNK_PLACES = 1 << 15, CHUNK_ROWS = 1024, TASK_VALUES = 1 << 15 };

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

static int64_t fold_of(const layout *x) {
    int64_t fold = x->dtype == FLOAT64 ? LANES_OF_FLOAT32 / 2 : LANES_OF_FLOAT32;
    for (int64_t channels = x->channels; fold > 1 && channels % 2 == 0; channels /= 2) fold /= 2;
    const bool fits = fold * x->channels <= MOST_COLUMNS && fold <= x->images * x->size;
    return fits ? fold : 1;
}

static plan planned(const layout *x, bool masked, bool per_image) {
    plan cut = {.x = *x, .rows = x->channels_last || x->size == 1, .fold = 1, .places = x->images * x->size};
    if (cut.places == 0) return cut;
    if (cut.rows && !masked && !per_image) cut.fold = fold_of(x);
    cut.chunk = per_image ? x->size : cut.rows ? CHUNK_ROWS : CHUNK_PLACES;
    const int64_t folded = parts(cut.places / cut.fold, cut.chunk), rest = cut.places % cut.fold != 0;
    cut.chunks = folded + rest;
    cut.partials = folded * cut.fold + rest;
    cut.group = cut.rows ? COLUMNS : parts(TASK_VALUES, least(cut.chunk, cut.places));
    const int64_t width = cut.fold * x->channels;
    cut.groups = parts(width, cut.group);
    cut.piece = cut.rows ? parts(TASK_VALUES, width) * width : TASK_VALUES;
    cut.pieces = parts(cut.places * x->channels, cut.piece);
    return cut;
}

/* GOMP_parallel of the OpenMP that torch has loaded, so that the threads are torch's own; or NULL. */
typedef void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
static parallel torchs_threads;

EXPORTED void syncbn_threads_of(parallel start) { torchs_threads = start; }

typedef struct {
    task run;
    const pass *pass;
    int64_t tasks, next;
} queue;

static void take_tasks(void *given) {
    queue *of = given;
    for (int64_t task; (task = __atomic_fetch_add(&of->next, 1, __ATOMIC_RELAXED)) < of->tasks;)
        of->run(of->pass, task);
}

/* Which thread does which task makes no difference to what it leaves. */
static void run(task each, const pass *pass, int64_t tasks) {
    static pid_t with_threads;
    queue of = {each, pass, tasks, 0};
    const int64_t threads = least(pass->plan->x.threads, tasks);
    /* A fork has none of its parent's threads, and would wait for them for ever */
    if (threads > 1 && torchs_threads && (with_threads == 0 || with_threads == getpid())) {
        with_threads = getpid();
        torchs_threads(take_tasks, &of, (unsigned)threads, 0);
    } else {
        take_tasks(&of);
    }
}

/* Memory for the coefficients, as doubles fit, to be freed by the first of them. */
static bool allocate(coefficients *of, const plan *cut) {
    const int64_t columns = cut->fold * cut->x.channels;
    double *memory = malloc((7 * columns + 1) * sizeof *memory), *part = memory;
    void **const each[] = {&of->pivot, &of->scale, &of->shift, &of->slope, &of->offset};
    if (!memory) return false;
    for (int i = 0; i < 5; i++, part += columns) *each[i] = part;
    of->scratch = part;
    return true;
}

/* The row of all that counts in x, [2C + 1], from partial sums cut up like that; between, if any, as in merge. */
static bool moments_by(const moments_call *call, plan cut, double *row, double *between) {
    const int64_t channels = cut.x.channels;
    double *rows = malloc((cut.partials * (2 * channels + 1) + 1) * sizeof *rows);
    if (!rows) return false;
    const pass pass = {.plan = &cut, .x = call->x, .mask = call->mask, .partials = rows};
    run(passes_of(cut.x.dtype)->moments, &pass, cut.chunks * cut.groups);
    merge(rows, cut.partials, channels, row, between);
    free(rows);
    return true;
}

EXPORTED int64_t syncbn_moments(const moments_call *call) {
    const layout *x = &call->x_layout;
    const int64_t channels = x->channels;
    if (call->between && x->size > 1) {
        /* Before the sums that are sent, so that whoever is looking changes no bit of those */
        if (!moments_by(call, planned(x, call->mask != NULL, true), call->packed, call->between)) return NO_MEMORY;
    }
    if (!moments_by(call, planned(x, call->mask != NULL, false), call->packed, NULL)) return NO_MEMORY;
    if (call->between && x->size == 1) {
        /* Each value is an image */
        for (int64_t c = 0; c <= channels; c++) call->between[c] = call->packed[channels + c];
    }
    if (call->as_message) to_message(call->packed, channels);
    return DONE;
}

EXPORTED int64_t syncbn_normalize(const normalize_call *call) {
    const layout *x = &call->x_layout;
    to_stats(call);
    if (call->running.mean.data) move_running(&call->running, call->stats, x->channels);
    const plan cut = planned(x, false, false);
    pass pass = {.plan = &cut, .x = call->x, .other = call->residual, .out = call->y, .relu = call->affine.relu};
    if (!allocate(&pass.of, &cut)) return NO_MEMORY;
    affine_coefficients(&pass.of, &cut, call->stats, &call->affine);
    run(passes_of(x->dtype)->normalize, &pass, cut.pieces);
    free(pass.of.pivot);
    return DONE;
}

EXPORTED int64_t syncbn_grad_sums(const grad_sums_call *call) {
    const layout *x = &call->x_layout;
    const plan cut = planned(x, false, false);
    pass pass = {.plan = &cut, .x = call->x, .other = call->dy, .y = call->y, .out = call->g};
    pass.relu = call->affine.relu;
    double *sums = pass.partials = malloc((cut.partials * 2 * x->channels + 1) * sizeof *sums);
    const bool failed = !allocate(&pass.of, &cut) || !sums;
    if (!failed) {
        affine_coefficients(&pass.of, &cut, call->stats, &call->affine);
        run(passes_of(x->dtype)->grad_sums, &pass, cut.chunks * cut.groups);
        add_partials(call, sums, cut.partials);
    }
    free(sums);
    free(pass.of.pivot);
    return failed ? NO_MEMORY : DONE;
}

EXPORTED int64_t syncbn_grad_input(const grad_input_call *call) {
    const layout *x = &call->x_layout;
    const plan cut = planned(x, call->mask != NULL, false);
    pass pass = {.plan = &cut, .x = call->x, .other = call->g, .out = call->dx, .mask = call->mask};
    pass.relu = call->affine.relu;
    if (!allocate(&pass.of, &cut)) return NO_MEMORY;
    affine_coefficients(&pass.of, &cut, call->stats, &call->affine);
    input_coefficients(&pass.of, &cut, call->stats, call->sums);
    run(passes_of(x->dtype)->grad_input, &pass, cut.pieces);
    free(pass.of.pivot);
    return DONE;
}

EXPORTED int64_t syncbn_update_running(const update_running_call *call) {
    move_running(&call->running, call->stats, call->channels);
    return DONE;
}

/* Makes row what all ranks' rows add up to. */
static int64_t send(const wire *by, double *row, int64_t n) {
    if (!by->share) return DONE;
    const int answer = by->share(by->box, row, (size_t)n, row, 0);
    return answer ? UNFINISHED + answer : DONE;
}

/* Moments, their message, and what is normalised by what all ranks sent. */
EXPORTED int64_t syncbn_forward(const forward_call *call) {
    const int64_t channels = call->x_layout.channels, row = 2 * channels + 1;
    const seen *seen = &call->seen;
    double *stats = call->stats, *packed = seen->packed ? seen->packed : stats;
    const moments_call moments = {call->x_layout, call->x, call->mask, packed, seen->between, call->as_message};
    const normalize_call rest = {
        .x_layout = call->x_layout, .x = call->x, .residual = call->residual, .y = call->y, .shared = stats,
        .rows = !call->as_message, .stats = stats, .affine = call->affine, .running = call->running,
    };
    int64_t answer = syncbn_moments(&moments);
    if (answer != DONE) return answer;
    if (packed != stats) memcpy(stats, packed, row * sizeof *stats);
    answer = send(&call->wire, stats, row);
    if (answer != DONE) return answer;
    const double count = stats[row - 1];
    if (count == 1 || count != count) return UNFIT;
    if (seen->before) copy_running(seen->before, &call->running, channels);
    answer = syncbn_normalize(&rest);
    if (seen->whole) memcpy(seen->whole, stats, row * sizeof *stats);
    return answer;
}

/* Sums of gradients, their message, and the gradient of x. */
EXPORTED int64_t syncbn_backward(const backward_call *call) {
    const int64_t channels = call->x_layout.channels;
    double *sums = malloc((2 * channels + 1) * sizeof *sums);
    if (!sums) return NO_MEMORY;
    const grad_sums_call first = {
        .x_layout = call->x_layout, .dy = call->dy, .x = call->x, .y = call->y, .g = call->g, .stats = call->stats,
        .packed = sums, .dweight = call->dweight, .dbias = call->dbias, .affine = call->affine,
    };
    grad_input_call rest = {
        .x_layout = call->x_layout, .g = call->g, .x = call->x, .mask = call->mask, .dx = call->dx,
        .stats = call->stats, .sums = sums, .affine = call->affine,
    };
    /* Told by y, the relu has been applied to g */
    rest.affine.relu = call->affine.relu && !call->y;
    int64_t answer = syncbn_grad_sums(&first);
    if (answer == DONE) answer = send(&call->wire, sums, 2 * channels);
    if (answer == DONE && call->dx) answer = syncbn_grad_input(&rest);
    free(sums);
    return answer;
}

/* Of the C that this was made of, see build.py. */
EXPORTED uint32_t syncbn_fingerprint(void) { return FINGERPRINT; }
