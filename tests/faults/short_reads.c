/* LD_PRELOAD: reads of packed blobs bring less than was asked for, and leave garbage behind it.
 *
 * While the file named by SHORT_READS exists, every pread*() of more than 8192 bytes from a file *.bin brings only its
 * first 5000; the bytes up to 8192 are filled with 0xEE, as a controller that gave up in the middle may leave them.
 * Each such read adds a byte to the file, so that a test can tell that it happened.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

enum { KEPT = 5000, TOUCHED = 8192 };

static int wanted(int fd, size_t length) {
    const char *order = getenv("SHORT_READS");
    char link[64], path[4096];
    if (order == NULL || length <= TOUCHED || access(order, F_OK) != 0) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t end = readlink(link, path, sizeof path);
    if (end < 4 || memcmp(path + end - 4, ".bin", 4) != 0) return 0;
    int count = open(order, O_WRONLY | O_APPEND | O_CLOEXEC);
    if (count >= 0) {
        if (write(count, "s", 1) != 1) abort();
        close(count);
    }
    return 1;
}

static ssize_t read_short(int fd, char *into, off64_t at) {
    static ssize_t (*real)(int, void *, size_t, off64_t);
    if (real == NULL) real = (ssize_t (*)(int, void *, size_t, off64_t))dlsym(RTLD_NEXT, "pread64");
    ssize_t got = real(fd, into, TOUCHED, at);
    if (got <= KEPT) return got;
    memset(into + KEPT, 0xEE, got - KEPT);
    return KEPT;
}

#define REAL(name, type) \
    static type real; \
    if (real == NULL) real = (type)dlsym(RTLD_NEXT, name)

typedef ssize_t (*preadv_t)(int, const struct iovec *, int, off64_t);
typedef ssize_t (*preadv2_t)(int, const struct iovec *, int, off64_t, int);
typedef ssize_t (*pread_t)(int, void *, size_t, off64_t);

#define DEFINE_PREAD(name) \
    ssize_t name(int fd, void *into, size_t length, off64_t at) { \
        REAL(#name, pread_t); \
        return wanted(fd, length) ? read_short(fd, into, at) : real(fd, into, length, at); \
    }
#define DEFINE_PREADV(name) \
    ssize_t name(int fd, const struct iovec *to, int count, off64_t at) { \
        REAL(#name, preadv_t); \
        if (count == 1 && wanted(fd, to->iov_len)) return read_short(fd, to->iov_base, at); \
        return real(fd, to, count, at); \
    }
#define DEFINE_PREADV2(name) \
    ssize_t name(int fd, const struct iovec *to, int count, off64_t at, int flags) { \
        REAL(#name, preadv2_t); \
        if (count == 1 && wanted(fd, to->iov_len)) return read_short(fd, to->iov_base, at); \
        return real(fd, to, count, at, flags); \
    }

DEFINE_PREAD(pread)
DEFINE_PREAD(pread64)
DEFINE_PREADV(preadv)
DEFINE_PREADV(preadv64)
DEFINE_PREADV2(preadv2)
DEFINE_PREADV2(preadv64v2)
