/* Counts what a process does to the files under one directory, and kills it just before one of these events.
 *
 * Loaded by LD_PRELOAD: every function here stands before the one of the C library that has its name, which Python,
 * HDF5, Arrow, FAISS and safetensors all call. `faults_arm` begins to count; the k-th event ends the process by SIGKILL before
 * it happens, or, where it is a write and `half` is asked for, after half of its bytes. Nothing is counted before
 * `faults_arm`, so a child that was forked is armed alone.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static char prefix[PATH_MAX];
static size_t prefix_length;
static long kill_at, later;
static int half_first, log_to = -1;
static atomic_int armed;
static atomic_long events;

void faults_arm(const char *directory, long at, int half, int log_fd, long seconds) {
    strncpy(prefix, directory, sizeof prefix - 1);
    prefix_length = strlen(prefix);
    kill_at = at, half_first = half, log_to = log_fd, later = seconds;
    atomic_store(&events, 0);
    atomic_store(&armed, 1);
}

long faults_count(void) { return atomic_load(&events); }

static void die(void) {
    for (;;) syscall(SYS_kill, (pid_t)syscall(SYS_getpid), SIGKILL);
}

static int within(const char *path) {
    return !strncmp(path, prefix, prefix_length) && (path[prefix_length] == '/' || !path[prefix_length]);
}

/* The path that a descriptor stands for; empty where it has none. */
static void path_of(int fd, char *to, size_t size) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t got = readlink(link, to, size - 1);
    to[got < 0 ? 0 : got] = 0;
}

/* Count an event; say whether it is the one to die at. */
static int event(const char *what, const char *path) {
    if (!within(path)) return 0;
    long number = atomic_fetch_add(&events, 1) + 1;
    if (log_to >= 0) {
        char line[PATH_MAX + 64];
        int length = snprintf(line, sizeof line, "%ld %s %s\n", number, what, path + prefix_length);
        if (length > 0) syscall(SYS_write, log_to, line, (size_t)length);
    }
    return number == kill_at;
}

static int event_at(const char *what, int directory, const char *path) {
    if (!atomic_load(&armed) || !path) return 0;
    if (path[0] == '/') return event(what, path);
    char whole[2 * PATH_MAX];
    if (directory != AT_FDCWD) path_of(directory, whole, PATH_MAX);
    else if (syscall(SYS_getcwd, whole, (size_t)PATH_MAX) < 0) return 0;
    size_t length = strlen(whole);
    snprintf(whole + length, sizeof whole - length, "/%s", path);
    return event(what, whole);
}

static int event_of(const char *what, int fd) {
    if (!atomic_load(&armed)) return 0;
    char path[PATH_MAX];
    path_of(fd, path, sizeof path);
    return event(what, path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define CALL(name, ...) (real_##name = real_##name ? real_##name : REAL(name), real_##name(__VA_ARGS__))
#define FUNCTION(type, name, ...) static type (*real_##name)(__VA_ARGS__); type name(__VA_ARGS__)

/* Functions of a path, and of a descriptor, that only pass it on. */
#define OF_PATH(name, where, path, parameters, ...)                                                                    \
    FUNCTION(int, name, __VA_ARGS__) { if (event_at(#name, where, path)) die(); return CALL(name, UNPACK parameters); }
#define OF_FD(type, name, parameters, ...)                                                                             \
    FUNCTION(type, name, __VA_ARGS__) { if (event_of(#name, fd)) die(); return CALL(name, UNPACK parameters); }
#define UNPACK(...) __VA_ARGS__

OF_PATH(rename, AT_FDCWD, to, (from, to), const char *from, const char *to)
OF_PATH(renameat, there, to, (here, from, there, to), int here, const char *from, int there, const char *to)
OF_PATH(renameat2, there, to, (here, from, there, to, flags), int here, const char *from, int there, const char *to,
        unsigned flags)
OF_PATH(unlink, AT_FDCWD, path, (path), const char *path)
OF_PATH(unlinkat, at, path, (at, path, flags), int at, const char *path, int flags)
OF_PATH(rmdir, AT_FDCWD, path, (path), const char *path)
OF_PATH(mkdir, AT_FDCWD, path, (path, mode), const char *path, mode_t mode)
OF_PATH(mkdirat, at, path, (at, path, mode), int at, const char *path, mode_t mode)
OF_PATH(link, AT_FDCWD, to, (from, to), const char *from, const char *to)
OF_PATH(linkat, there, to, (here, from, there, to, flags), int here, const char *from, int there, const char *to,
        int flags)
OF_PATH(symlink, AT_FDCWD, to, (from, to), const char *from, const char *to)
OF_PATH(symlinkat, there, to, (from, there, to), const char *from, int there, const char *to)
OF_PATH(truncate, AT_FDCWD, path, (path, size), const char *path, off_t size)
OF_PATH(truncate64, AT_FDCWD, path, (path, size), const char *path, off64_t size)
OF_FD(int, fsync, (fd), int fd)
OF_FD(int, fdatasync, (fd), int fd)
OF_FD(int, ftruncate, (fd, size), int fd, off_t size)
OF_FD(int, ftruncate64, (fd, size), int fd, off64_t size)
OF_FD(int, fallocate, (fd, mode, from, size), int fd, int mode, off_t from, off_t size)
OF_FD(int, fallocate64, (fd, mode, from, size), int fd, int mode, off64_t from, off64_t size)
OF_FD(int, posix_fallocate, (fd, from, size), int fd, off_t from, off_t size)
OF_FD(int, posix_fallocate64, (fd, from, size), int fd, off64_t from, off64_t size)
OF_FD(ssize_t, writev, (fd, parts, number), int fd, const struct iovec *parts, int number)
OF_FD(ssize_t, pwritev, (fd, parts, number, at), int fd, const struct iovec *parts, int number, off_t at)
OF_FD(ssize_t, sendfile, (fd, from, at, size), int fd, int from, off_t *at, size_t size)
OF_FD(ssize_t, sendfile64, (fd, from, at, size), int fd, int from, off64_t *at, size_t size)

FUNCTION(ssize_t, copy_file_range, int from, off64_t *a, int to, off64_t *b, size_t size, unsigned flags) {
    if (event_of("copy_file_range", to)) die();
    return CALL(copy_file_range, from, a, to, b, size, flags);
}

/* Writes, which may be cut in half. */
#define OF_BYTES(name, parameters, cut, ...)                                                                           \
    FUNCTION(ssize_t, name, __VA_ARGS__) {                                                                             \
        if (event_of(#name, fd)) { if (half_first) CALL(name, UNPACK cut); die(); }                                    \
        return CALL(name, UNPACK parameters);                                                                          \
    }
OF_BYTES(write, (fd, bytes, size), (fd, bytes, size / 2), int fd, const void *bytes, size_t size)
OF_BYTES(pwrite, (fd, bytes, size, at), (fd, bytes, size / 2, at), int fd, const void *bytes, size_t size, off_t at)
OF_BYTES(pwrite64, (fd, bytes, size, at), (fd, bytes, size / 2, at), int fd, const void *bytes, size_t size, off64_t at)

FUNCTION(size_t, fwrite, const void *bytes, size_t size, size_t number, FILE *file) {
    if (atomic_load(&armed) && event_of("fwrite", fileno(file))) {
        if (half_first) CALL(fwrite, bytes, size, number / 2, file), fflush(file);
        die();
    }
    return CALL(fwrite, bytes, size, number, file);
}

FUNCTION(int, fclose, FILE *file) {
    if (atomic_load(&armed) && (fcntl(fileno(file), F_GETFL) & O_ACCMODE) != O_RDONLY &&
        event_of("fclose", fileno(file))) die();
    return CALL(fclose, file);
}

/* The time of day, some seconds later: what depends on it is not the same bytes twice. */
FUNCTION(int, gettimeofday, struct timeval *restrict to, void *restrict zone) {
    int status = CALL(gettimeofday, to, zone);
    if (atomic_load(&armed)) to->tv_sec += later;
    return status;
}
FUNCTION(int, clock_gettime, clockid_t clock, struct timespec *to) {
    int status = CALL(clock_gettime, clock, to);
    if (atomic_load(&armed) && clock == CLOCK_REALTIME) to->tv_sec += later;
    return status;
}

/* A map is written back by msync: its path is not known, so it counts wherever it is. */
FUNCTION(int, msync, void *at, size_t size, int flags) {
    if (atomic_load(&armed) && event("msync", prefix)) die();
    return CALL(msync, at, size, flags);
}

static int writes(int flags) { return (flags & O_ACCMODE) != O_RDONLY || flags & (O_CREAT | O_TRUNC); }

#define MODE(last) mode_t mode = 0; va_list rest; va_start(rest, last); mode = va_arg(rest, mode_t); va_end(rest)
#define OPENS(name)                                                                                                    \
    static int (*real_##name)(const char *, int, ...);                                                                 \
    int name(const char *path, int flags, ...) {                                                                       \
        MODE(flags);                                                                                                   \
        if (writes(flags) && event_at("open", AT_FDCWD, path)) die();                                                  \
        return CALL(name, path, flags, mode);                                                                          \
    }
#define OPENS_AT(name)                                                                                                 \
    static int (*real_##name)(int, const char *, int, ...);                                                            \
    int name(int at, const char *path, int flags, ...) {                                                               \
        MODE(flags);                                                                                                   \
        if (writes(flags) && event_at("open", at, path)) die();                                                        \
        return CALL(name, at, path, flags, mode);                                                                      \
    }
OPENS(open)
OPENS(open64)
OPENS_AT(openat)
OPENS_AT(openat64)
OF_PATH(creat, AT_FDCWD, path, (path, mode), const char *path, mode_t mode)
OF_PATH(creat64, AT_FDCWD, path, (path, mode), const char *path, mode_t mode)

#define FOPENS(name)                                                                                                   \
    FUNCTION(FILE *, name, const char *path, const char *mode) {                                                       \
        if (strpbrk(mode, "wa+") && event_at("open", AT_FDCWD, path)) die();                                           \
        return CALL(name, path, mode);                                                                                 \
    }
FOPENS(fopen)
FOPENS(fopen64)
