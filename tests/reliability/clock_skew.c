/* The clock of one process, 20 s ahead: the process whose id is in the first four bytes of the file CLOCK_SKEW. The next
   four count how often it was told that time. Every other process of the system has the machine's. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

typedef struct { volatile int pid; volatile unsigned count; } skew_t;
static skew_t *skew;
static int (*real_gettime)(clockid_t, struct timespec *);
static int (*real_timeofday)(struct timeval *, void *);

__attribute__((constructor)) static void open_skew(void) {
    const char *path = getenv("CLOCK_SKEW");
    int file = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    real_gettime = dlsym(RTLD_NEXT, "clock_gettime");
    real_timeofday = dlsym(RTLD_NEXT, "gettimeofday");
    if (file < 0) return;
    void *found = mmap(0, sizeof(skew_t), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (found != MAP_FAILED) skew = found;
}

static int is_skewed(void) {
    if (!skew || !skew->pid || skew->pid != getpid()) return 0;
    __sync_fetch_and_add(&skew->count, 1);
    return 1;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    if (!real_gettime) real_gettime = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real_gettime(clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE) && is_skewed()) now->tv_sec += 20;
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    if (!real_timeofday) real_timeofday = dlsym(RTLD_NEXT, "gettimeofday");
    int failed = real_timeofday(now, zone);
    if (!failed && is_skewed()) now->tv_sec += 20;
    return failed;
}

time_t time(time_t *where) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME_COARSE, &now);
    if (where) *where = now.tv_sec;
    return now.tv_sec;
}
