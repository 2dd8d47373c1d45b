/* Rows of doubles that the processes of one host leave for each other in one mapping. Linux; C11; no Python in it.

   A message: every rank writes its row into one of its two slots and counts itself in `arrivals`; whoever finds that
   all have arrived reads their rows. The count is the only word that ranks wait for.

   Order. Each arrival is a read-modify-write that releases what its rank wrote before, and they form one release
   sequence: a rank that acquires the last of them sees the rows of all.

   Two slots suffice. A rank writes message k into the slot of message k - 2 only after its message k - 1 was complete,
   so after every peer had arrived in k - 1, which a peer does only when it has read all that it wants of k - 2; and no
   rank arrives in k + 1 before all have in k, so that the rows of at most two messages are wanted at any time. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <stdalign.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { LINE = 64, NONCE = 16, CAPACITY = 8192, PIECE = 256 };  // bytes, bytes, doubles, doubles
enum { SUM, ROWS, FIRST };                           // what a rank reads
enum { COMPLETE, WAITING, LENGTHS_DIFFER, CLOSED };  // what a call returns
enum { COMING, ARRIVED, GONE };                      // what a rank is about the message that is waited for

static const long SLICE_NS = 50 * 1000 * 1000;
static const uint32_t SPIN_AGAIN_AFTER = 4;  // messages
const size_t mailbox_capacity = CAPACITY;

struct card {
    alignas(LINE) _Atomic uint32_t sequence;  // of the last message in which the rank has arrived
    uint64_t lengths[2];                      // of the row in each slot
};

struct shared {
    alignas(LINE) unsigned char nonce[NONCE];
    alignas(LINE) _Atomic uint32_t arrivals;  // of all ranks in all messages; it wraps
    struct card cards[];                      // of each rank; behind them, from the next page on, its two slots
};

struct mailbox {
    struct shared *shared;
    double *slots;
    size_t size;
    uint32_t rank, ranks, sequence;
    uint32_t read;       // the last message that was complete; behind sequence if an error came between
    uint32_t spin_from;  // the message from which on it is tried again
    long spin_ns;
    int file;
};

static size_t slots_offset(uint32_t ranks) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    return (sizeof(struct shared) + ranks * sizeof(struct card) + page - 1) / page * page;
}

/* Bytes that a mailbox of so many ranks takes. */
size_t mailbox_size(uint32_t ranks) { return slots_offset(ranks) + (size_t)ranks * 2 * CAPACITY * sizeof(double); }

/* A lock on a rank's byte of the file: the kernel lifts it when the rank dies or closes its mailbox. */
static struct flock byte_of(uint32_t rank) {
    return (struct flock){.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = rank, .l_len = 1};
}

void mailbox_close(struct mailbox *box) {
    if (!box) return;
    munmap(box->shared, box->size);
    close(box->file);
    free(box);
}

/* Take the place of `rank` in a file that begins with `nonce`; NULL, and errno, if that cannot be. */
struct mailbox *mailbox_open(int file, const unsigned char *nonce, uint32_t rank, uint32_t ranks, long spin_ns) {
    struct mailbox *box = calloc(1, sizeof *box);
    if (!box) return NULL;
    *box = (struct mailbox){.size = mailbox_size(ranks), .rank = rank, .ranks = ranks, .spin_ns = spin_ns};
    box->file = fcntl(file, F_DUPFD_CLOEXEC, 0);
    box->shared = mmap(NULL, box->size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (box->file < 0 || box->shared == MAP_FAILED) {
        int why = errno;
        if (box->file >= 0) close(box->file);
        free(box);
        errno = why;
        return NULL;
    }
    box->slots = (double *)((char *)box->shared + slots_offset(ranks));
    struct flock lock = byte_of(rank);
    bool found = memcmp(box->shared->nonce, nonce, NONCE) == 0;
    if (!found || fcntl(box->file, F_OFD_SETLK, &lock) < 0) {
        int why = found ? errno : ESTALE;
        mailbox_close(box);
        errno = why;
        return NULL;
    }
    return box;
}

static double *slot(const struct mailbox *box, uint32_t rank) {
    return box->slots + (2 * (size_t)rank + box->sequence % 2) * CAPACITY;
}

static long futex(_Atomic uint32_t *word, int operation, uint32_t value, const struct timespec *timeout) {
    return syscall(SYS_futex, word, operation, value, timeout, NULL, 0);
}

static void arrive(struct mailbox *box, const double *row, size_t n) {
    struct shared *shared = box->shared;
    struct card *card = &shared->cards[box->rank];
    uint32_t all = ++box->sequence * box->ranks;
    if (row) memcpy(slot(box, box->rank), row, n * sizeof(double));
    card->lengths[box->sequence % 2] = n;
    uint32_t before = atomic_fetch_add_explicit(&shared->arrivals, 1, memory_order_acq_rel);
    // Behind the arrival: who dies between the two is missed by nobody
    atomic_store_explicit(&card->sequence, box->sequence, memory_order_release);
    if (before + 1 == all) futex(&shared->arrivals, FUTEX_WAKE, INT32_MAX, NULL);
}

static bool complete(const struct mailbox *box, uint32_t *arrivals) {
    *arrivals = atomic_load_explicit(&box->shared->arrivals, memory_order_acquire);
    return (int32_t)(*arrivals - box->sequence * box->ranks) >= 0;
}

static long since_ns(const struct timespec *start) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (now.tv_sec - start->tv_sec) * 1000000000L + (now.tv_nsec - start->tv_nsec);
}

static void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
}

/* Wait for a moment without sleeping. Where that was no use it is left alone for some messages: a peer that shares this
   rank's core cannot come meanwhile. */
static bool spin_for_all(struct mailbox *box, const struct timespec *start) {
    uint32_t seen;
    if ((int32_t)(box->sequence - box->spin_from) < 0) return false;
    while (since_ns(start) < box->spin_ns) {
        pause_briefly();
        if (complete(box, &seen)) return true;
    }
    box->spin_from = box->sequence + SPIN_AGAIN_AFTER;
    return false;
}

/* Wait until all have arrived, but not longer than a slice, nor past a signal. */
static bool wait_for_all(struct mailbox *box) {
    uint32_t seen;
    if (complete(box, &seen)) return true;
    struct timespec start;
    clock_gettime(CLOCK_MONOTONIC, &start);
    if (spin_for_all(box, &start) || complete(box, &seen)) return true;
    for (long left = SLICE_NS; left > 0; left = SLICE_NS - since_ns(&start)) {
        struct timespec timeout = {.tv_nsec = left};
        bool signalled = futex(&box->shared->arrivals, FUTEX_WAIT, seen, &timeout) < 0 && errno == EINTR;
        if (complete(box, &seen)) return true;
        if (signalled) return false;
    }
    return false;
}

/* out [n]: the sum of ranks' rows from place `from` on, in pairs, pairs of pairs, and so on: hosts of equal powers of two
   of ranks that add up their sums by pairs come to the same bits. */
static void add_up(const struct mailbox *box, uint32_t first, uint32_t ranks, size_t from, size_t n, double *out) {
    if (ranks == 1) {
        memcpy(out, slot(box, first) + from, n * sizeof(double));
        return;
    }
    uint32_t left = 1;
    while (2 * left < ranks) left *= 2;
    double right[PIECE];
    add_up(box, first, left, from, n, out);
    add_up(box, first + left, ranks - left, from, n, right);
    for (size_t i = 0; i < n; i++) out[i] += right[i];
}

static int read_rows(struct mailbox *box, size_t n, double *out, int what) {
    box->read = box->sequence;
    for (uint32_t rank = 0; rank < box->ranks; rank++)
        if (box->shared->cards[rank].lengths[box->sequence % 2] != n) return LENGTHS_DIFFER;
    if (what == SUM)
        for (size_t from = 0; from < n; from += PIECE)
            add_up(box, 0, box->ranks, from, n - from < PIECE ? n - from : PIECE, out + from);
    else
        for (uint32_t rank = 0; rank < (what == ROWS ? box->ranks : 1); rank++)
            memcpy(out + rank * n, slot(box, rank), n * sizeof(double));
    return COMPLETE;
}

/* Go on with a message for which mailbox_share returned WAITING. */
int mailbox_finish(struct mailbox *box, size_t n, double *out, int what) {
    if (!box) return CLOSED;
    return wait_for_all(box) ? read_rows(box, n, out, what) : WAITING;
}

/* Leave row [n], n <= CAPACITY, and read what all left: into out, [n] their sum or the first rank's row, or [ranks, n]
   all rows. Rows are added up by pairs in the order of ranks. out may be row, unless it is for all rows; row is NULL where
   nobody reads it. */
int mailbox_share(struct mailbox *box, const double *row, size_t n, double *out, int what) {
    if (!box || box->read != box->sequence) return CLOSED;
    arrive(box, row, n);
    return mailbox_finish(box, n, out, what);
}

/* What a peer is about the message that this rank waits for. */
int mailbox_peer(const struct mailbox *box, uint32_t rank) {
    struct flock lock = byte_of(rank);
    bool gone = rank != box->rank && fcntl(box->file, F_OFD_GETLK, &lock) == 0 && lock.l_type == F_UNLCK;
    // In this order: what a rank did before it went is seen
    uint32_t sequence = atomic_load_explicit(&box->shared->cards[rank].sequence, memory_order_acquire);
    if ((int32_t)(sequence - box->sequence) >= 0) return ARRIVED;
    return gone ? GONE : COMING;
}

/* The length of a peer's row in the message that is complete. */
size_t mailbox_length(const struct mailbox *box, uint32_t rank) {
    return box->shared->cards[rank].lengths[box->sequence % 2];
}
