/* Moves the wall clock of one process by as many seconds as the file SOP_TEST_CLOCK says; other clocks stay as they are. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

int clock_gettime(clockid_t id, struct timespec *at) {
    int failed = (int) syscall(SYS_clock_gettime, id, at);
    const char *name = id == CLOCK_REALTIME ? getenv("SOP_TEST_CLOCK") : NULL;
    FILE *file = failed || !name ? NULL : fopen(name, "r");
    long seconds = 0;
    if (file) {
        if (fscanf(file, "%ld", &seconds) == 1) at->tv_sec += seconds;
        fclose(file);
    }
    return failed;
}
