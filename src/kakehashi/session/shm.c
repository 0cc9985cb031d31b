/*
 * Preloaded into a session's programs where /dev/shm itself is closed to them.
 *
 * POSIX shared memory and named semaphores lie in the folder that KAKEHASHI_SHM names, not in
 * /dev/shm, where glibc puts them with no way to say otherwise. Where the variable is not set
 * each call is handed on to glibc. Names, files and errors are glibc's, with two exceptions:
 * "." and ".." are no names, and a semaphore's file that is no regular file or too short to hold
 * one is refused. Programs that ask how much room /dev/shm has, to put files there on their own
 * (Python's heap of shared arrays, joblib), are told that it is full; they then use TMPDIR.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#define SYSTEM_FOLDER "/dev/shm"
#define TRIES 50

/* One semaphore as this process has it mapped; opened again, it is the same address. */
struct mapping {
    struct mapping *next;
    sem_t *semaphore;
    unsigned long uses;
    dev_t device;
    ino_t inode;
    char name[];
};

static pthread_once_t once = PTHREAD_ONCE_INIT;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct mapping *mappings;
static const char *folder; /* NULL: as glibc */

static int (*system_shm_open)(const char *, int, mode_t);
static int (*system_shm_unlink)(const char *);
static sem_t *(*system_sem_open)(const char *, int, ...);
static int (*system_sem_close)(sem_t *);
static int (*system_sem_unlink)(const char *);
static int (*system_statvfs)(const char *, struct statvfs *);
static int (*system_statvfs64)(const char *, struct statvfs64 *);

static void hold(void)
{
    pthread_mutex_lock(&lock);
}

static void release(void)
{
    pthread_mutex_unlock(&lock);
}

static void start(void)
{
    const char *named = getenv("KAKEHASHI_SHM");

    system_shm_open = dlsym(RTLD_NEXT, "shm_open");
    system_shm_unlink = dlsym(RTLD_NEXT, "shm_unlink");
    system_sem_open = dlsym(RTLD_NEXT, "sem_open");
    system_sem_close = dlsym(RTLD_NEXT, "sem_close");
    system_sem_unlink = dlsym(RTLD_NEXT, "sem_unlink");
    system_statvfs = dlsym(RTLD_NEXT, "statvfs");
    system_statvfs64 = dlsym(RTLD_NEXT, "statvfs64");
    if (named == NULL)
        return;
    /* Kept: a program may empty its environment, what it has open must stay where it is. */
    folder = strdup(named);
    /* A child forked while another thread holds the lock would wait for it forever. */
    if (folder == NULL || pthread_atfork(hold, release, release) != 0)
        abort();
}

/* Other libraries' constructors may call before this one's turn, hence once. */
__attribute__((constructor)) static void begin(void)
{
    pthread_once(&once, start);
}

/* Write the path of a name to `path`; the result is 0 or what is wrong. */
static int place(char path[PATH_MAX], const char *prefix, const char *name)
{
    int length;

    while (*name == '/')
        name++;
    if (*name == '\0' || strchr(name, '/') != NULL)
        return EINVAL;
    if (strlen(prefix) + strlen(name) > NAME_MAX)
        return ENAMETOOLONG;
    if (*prefix == '\0' && (strcmp(name, ".") == 0 || strcmp(name, "..") == 0))
        return EINVAL;
    length = snprintf(path, PATH_MAX, "%s/%s%s", folder, prefix, name);
    return folder[0] == '/' && length < PATH_MAX ? 0 : ENOSYS;
}

int shm_open(const char *name, int oflag, mode_t mode)
{
    char path[PATH_MAX];
    int error, fd, state;

    begin();
    if (folder == NULL)
        return system_shm_open(name, oflag, mode);
    error = place(path, "", name);
    if (error != 0) {
        errno = error;
        return -1;
    }
    pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &state);
    fd = open(path, oflag | O_NOFOLLOW | O_CLOEXEC | O_LARGEFILE, mode);
    if (fd < 0 && errno == EISDIR)
        errno = EINVAL;
    pthread_setcancelstate(state, NULL);
    return fd;
}

static int discard(const char *prefix, const char *name)
{
    char path[PATH_MAX];
    int error = place(path, prefix, name);

    if (error != 0) {
        errno = error == EINVAL ? ENOENT : error;
        return -1;
    }
    if (unlink(path) == 0)
        return 0;
    if (errno == EPERM)
        errno = EACCES;
    return -1;
}

int shm_unlink(const char *name)
{
    begin();
    return folder == NULL ? system_shm_unlink(name) : discard("", name);
}

int sem_unlink(const char *name)
{
    begin();
    return folder == NULL ? system_sem_unlink(name) : discard("sem.", name);
}

static int fill(int fd, const sem_t *content)
{
    ssize_t written = write(fd, content, sizeof *content);

    if (written == (ssize_t)sizeof *content)
        return 0;
    if (written >= 0)
        errno = ENOSPC;
    return -1;
}

/* Make the semaphore under another name first: nobody ever opens one that is not whole. */
static int create(const char *path, mode_t mode, unsigned int value)
{
    char part[PATH_MAX];
    unsigned long long number;
    sem_t content;
    int error, fd, tries;

    memset(&content, 0, sizeof content);
    if (sem_init(&content, 1, value) != 0)
        return -1;
    for (fd = -1, tries = 0; fd < 0 && tries < TRIES; tries++) {
        if (getentropy(&number, sizeof number) != 0)
            return -1;
        if (snprintf(part, sizeof part, "%s/.sem-%016llx", folder, number) >= (int)sizeof part) {
            errno = ENAMETOOLONG;
            return -1;
        }
        fd = open(part, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, mode);
        if (fd < 0 && errno != EEXIST)
            return -1;
    }
    if (fd < 0)
        return -1;
    error = fill(fd, &content) == 0 && link(part, path) == 0 ? 0 : errno;
    unlink(part);
    if (error == 0)
        return fd;
    close(fd);
    errno = error;
    return -1;
}

/* The semaphore in an open file: the address that this process has it at, or a new one. */
static sem_t *attach(int fd, const char *name)
{
    struct mapping *one;
    struct stat status;
    void *address;

    if (fstat(fd, &status) != 0)
        return SEM_FAILED;
    if (!S_ISREG(status.st_mode) || status.st_size < (off_t)sizeof(sem_t)) {
        errno = EINVAL;
        return SEM_FAILED;
    }
    for (one = mappings; one != NULL; one = one->next)
        if (one->device == status.st_dev && one->inode == status.st_ino &&
            strcmp(one->name, name) == 0) {
            one->uses++;
            return one->semaphore;
        }
    one = malloc(sizeof *one + strlen(name) + 1);
    if (one == NULL)
        return SEM_FAILED;
    address = mmap(NULL, sizeof(sem_t), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (address == MAP_FAILED) {
        free(one);
        return SEM_FAILED;
    }
    one->next = mappings;
    one->semaphore = address;
    one->uses = 1;
    one->device = status.st_dev;
    one->inode = status.st_ino;
    strcpy(one->name, name);
    mappings = one;
    return address;
}

static int open_or_create(const char *path, int oflag, mode_t mode, unsigned int value)
{
    const int only_new = (oflag & O_CREAT) != 0 && (oflag & O_EXCL) != 0;
    int fd;

    /* Made or removed by others in between: look again. */
    for (;;) {
        if (!only_new) {
            fd = open(path, O_RDWR | O_NOFOLLOW | O_CLOEXEC);
            if (fd >= 0 || (oflag & O_CREAT) == 0 || errno != ENOENT)
                return fd;
        }
        fd = create(path, mode, value);
        if (fd >= 0 || only_new || errno != EEXIST)
            return fd;
    }
}

sem_t *sem_open(const char *name, int oflag, ...)
{
    char path[PATH_MAX];
    sem_t *semaphore = SEM_FAILED;
    unsigned int value = 0;
    mode_t mode = 0;
    int error, fd, state;

    if ((oflag & O_CREAT) != 0) {
        va_list rest;
        va_start(rest, oflag);
        mode = va_arg(rest, mode_t);
        value = va_arg(rest, unsigned int);
        va_end(rest);
    }
    begin();
    if (folder == NULL)
        return system_sem_open(name, oflag, mode, value);
    error = place(path, "sem.", name);
    if (error != 0) {
        errno = error;
        return SEM_FAILED;
    }
    /* A thread that is cancelled in here would keep the lock. */
    pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &state);
    fd = open_or_create(path, oflag, mode, value);
    if (fd >= 0) {
        hold();
        semaphore = attach(fd, path);
        release();
        error = errno;
        close(fd);
        errno = error;
    }
    pthread_setcancelstate(state, NULL);
    return semaphore;
}

int sem_close(sem_t *semaphore)
{
    struct mapping **link, *one;
    int gone = 0;

    begin();
    hold();
    for (link = &mappings; *link != NULL && (*link)->semaphore != semaphore;)
        link = &(*link)->next;
    one = *link;
    if (one != NULL && --one->uses == 0) {
        *link = one->next;
        gone = munmap(one->semaphore, sizeof(sem_t));
        free(one);
    }
    release();
    /* Opened by another library's own copy of glibc's code, or not at all: glibc says. */
    return one == NULL ? system_sem_close(semaphore) : gone;
}

static int is_system_folder(const char *path)
{
    return strcmp(path, SYSTEM_FOLDER) == 0 || strcmp(path, SYSTEM_FOLDER "/") == 0;
}

int statvfs(const char *path, struct statvfs *status)
{
    int result;

    begin();
    result = system_statvfs(path, status);
    if (result == 0 && folder != NULL && is_system_folder(path))
        status->f_bfree = status->f_bavail = 0;
    return result;
}

int statvfs64(const char *path, struct statvfs64 *status)
{
    int result;

    begin();
    result = system_statvfs64(path, status);
    if (result == 0 && folder != NULL && is_system_folder(path))
        status->f_bfree = status->f_bavail = 0;
    return result;
}
