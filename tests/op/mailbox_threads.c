/* Threads in the place of ranks, for a sanitizer to look for races: they share one mapping at one address. */

// First, as it says what the system's headers declare
#include "../../syncbn/shared_memory/mailbox.c"

#include <pthread.h>
#include <stdio.h>

enum { RANKS = 4, TURNS = 2000, LENGTH = 100 };

static void *rank_at_work(void *argument) {
    struct mailbox *box = argument;
    double row[LENGTH], rows[RANKS * LENGTH];
    long wrong = 0;
    for (int turn = 0; turn < TURNS; turn++) {
        for (int i = 0; i < LENGTH; i++) row[i] = turn + box->rank;
        int what = turn % 3;
        double *out = what == ROWS ? rows : row;
        int answer = mailbox_share(box, row, LENGTH, out, what);
        while (answer == WAITING) answer = mailbox_finish(box, LENGTH, out, what);
        double want = what == SUM ? RANKS * turn + RANKS * (RANKS - 1) / 2 : turn;
        wrong += answer != COMPLETE || out[LENGTH - 1] != want;
    }
    return (void *)wrong;
}

int main(void) {
    struct mailbox boxes[RANKS];
    pthread_t threads[RANKS];
    size_t size = mailbox_size(RANKS);
    struct shared *shared = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    for (uint32_t rank = 0; rank < RANKS; rank++) {
        boxes[rank] = (struct mailbox){.shared = shared, .size = size, .rank = rank, .ranks = RANKS, .spin_ns = 1000};
        boxes[rank].slots = (double *)((char *)shared + slots_offset(RANKS));
        pthread_create(&threads[rank], NULL, rank_at_work, &boxes[rank]);
    }
    long wrong = 0;
    for (int rank = 0; rank < RANKS; rank++) {
        void *of_rank;
        pthread_join(threads[rank], &of_rank);
        wrong += (long)of_rank;
    }
    printf("%ld wrong\n", wrong);
    return wrong != 0;
}
