/* Plain POSIX. Every call that a signal can interrupt is repeated; standard input alone stops. */
#include "base/file.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/system.h"

/* Opens a regular file for reading and tells about it; *fd is -1 on failure. */
static tril_status file_open(const char *path, int *fd, struct stat *info, struct tril_error *err) {
    tril_status st = TRIL_OK;
    /* O_NONBLOCK: opening a pipe by mistake must not hang; regular files ignore it. */
    *fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (*fd < 0 || fstat(*fd, info) != 0)
        st = error_set_errno(err, "cannot read %s", path);
    else if (S_ISDIR(info->st_mode))
        st = error_set(err, TRIL_ERR_IO, "%s is a directory; give a file", path);
    else if (!S_ISREG(info->st_mode))
        st = error_set(err, TRIL_ERR_IO, "%s is not a regular file", path);
    if (st != TRIL_OK && *fd >= 0) {
        close(*fd);
        *fd = -1;
    }
    return st;
}

static tril_status too_large(const char *path, size_t limit, struct tril_error *err) {
    return error_set(err, TRIL_ERR_FORMAT, "%s is larger than the %zu bytes allowed here", path,
                     limit);
}

tril_status file_read(const char *path, size_t limit, char **data, size_t *size,
                      struct tril_error *err) {
    int fd;
    struct stat info;
    char *buffer = NULL;
    size_t used = 0;
    tril_status st;
    *data = NULL;
    *size = 0;
    TRY(file_open(path, &fd, &info, err));
    size_t room = (size_t)info.st_size;
    if (room > limit) {
        st = too_large(path, limit, err);
        goto done;
    }
    if (room == SIZE_MAX || !(buffer = malloc(room + 1))) {
        st = error_set(err, TRIL_ERR_MEMORY, "not enough memory to read %s", path);
        goto done;
    }
    while (used < room) {
        ssize_t n = read(fd, buffer + used, room - used);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0) {
            st = error_set_errno(err, "cannot read %s", path);
            goto done;
        }
        if (n == 0)
            break; /* it became shorter meanwhile */
        used += (size_t)n;
    }
    buffer[used] = '\0';
    *data = buffer;
    *size = used;
    buffer = NULL;
done:
    free(buffer);
    if (fd >= 0)
        close(fd);
    return st;
}

tril_status file_read_stream(int fd, const char *name, size_t limit, char **data, size_t *size,
                             struct tril_error *err) {
    tril_status st = TRIL_OK;
    char *buffer = NULL;
    size_t used = 0, room = 0;
    *data = NULL;
    *size = 0;
    for (;;) {
        if (room - used < 2) { /* a byte more than read, for the NUL */
            size_t more = room ? 2 * room : 1 << 16;
            char *grown = more > room ? realloc(buffer, more) : NULL;
            if (!grown) {
                st = error_set(err, TRIL_ERR_MEMORY, "not enough memory to read %s", name);
                goto done;
            }
            buffer = grown;
            room = more;
        }
        ssize_t n = read(fd, buffer + used, room - used - 1);
        if (n < 0 && errno == EINTR && !signal_caught())
            continue;
        if (n < 0) {
            st = errno == EINTR ? error_set(err, TRIL_ERR_INTERRUPTED, "stopped reading %s", name)
                                : error_set_errno(err, "cannot read %s", name);
            goto done;
        }
        if (n == 0)
            break;
        used += (size_t)n;
        if (used > limit) {
            st = too_large(name, limit, err);
            goto done;
        }
    }
    buffer[used] = '\0';
    *data = buffer;
    *size = used;
    buffer = NULL;
done:
    free(buffer);
    return st;
}

tril_status file_map_open(struct file_map *m, const char *path, struct tril_error *err) {
    int fd;
    struct stat info;
    *m = (struct file_map){0};
    tril_status st = file_open(path, &fd, &info, err);
    if (st != TRIL_OK)
        return st;
    if (info.st_size > 0) {
        void *data = mmap(NULL, (size_t)info.st_size, PROT_READ, MAP_SHARED, fd, 0);
        if (data == MAP_FAILED)
            st = error_set_errno(err, "cannot map %s into memory", path);
        else
            m->data = data;
    }
    if (st == TRIL_OK) {
        m->size = (size_t)info.st_size;
        m->mtime_ns = (int64_t)info.st_mtim.tv_sec * 1000000000 + info.st_mtim.tv_nsec;
    }
    close(fd);
    return st;
}

void file_map_close(struct file_map *m) {
    if (m->data)
        munmap((void *)(uintptr_t)m->data, m->size);
    *m = (struct file_map){0};
}

/* Atomic writes. */

struct file_writer {
    FILE *stream;
    char *path, *temporary; /* temporary is NULL when a device or a pipe is written in place */
};

static void writer_free(struct file_writer *w) {
    free(w->path);
    free(w->temporary);
    free(w);
}

tril_status file_writer_open(struct file_writer **out, const char *path, struct tril_error *err) {
    tril_status st = TRIL_OK;
    struct stat info;
    int fd = -1;
    bool exists = stat(path, &info) == 0;
    struct file_writer *w = calloc(1, sizeof *w);
    *out = NULL;
    if (!w || !(w->path = strdup(path))) {
        st = error_set(err, TRIL_ERR_MEMORY, "not enough memory to write %s", path);
        goto done;
    }
    if (exists && S_ISDIR(info.st_mode)) {
        st = error_set(err, TRIL_ERR_IO, "cannot write %s: it is a directory", path);
        goto done;
    }
    if (exists && !S_ISREG(info.st_mode)) {
        fd = open(path, O_WRONLY | O_CLOEXEC);
    } else {
        if (asprintf(&w->temporary, "%s.tmp-%ld", path, (long)getpid()) < 0) {
            w->temporary = NULL;
            st = error_set(err, TRIL_ERR_MEMORY, "not enough memory to write %s", path);
            goto done;
        }
        fd = open(w->temporary, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0666);
        if (fd >= 0 && exists && fchmod(fd, info.st_mode & 0777) != 0) {
            st = error_set_errno(err, "cannot set the permissions of %s", w->temporary);
            unlink(w->temporary);
            goto done;
        }
    }
    if (fd < 0 || !(w->stream = fdopen(fd, "wb"))) {
        st = error_set_errno(err, "cannot write %s", path);
        goto done;
    }
    fd = -1;
    *out = w;
    w = NULL;
done:
    if (fd >= 0)
        close(fd);
    if (w)
        writer_free(w);
    return st;
}

tril_status file_writer_write(struct file_writer *w, const void *data, size_t size,
                              struct tril_error *err) {
    if (size > 0 && fwrite(data, 1, size, w->stream) != size)
        return error_set_errno(err, "cannot write %s", w->path);
    return TRIL_OK;
}

tril_status file_writer_patch(struct file_writer *w, size_t offset, const void *data, size_t size,
                              struct tril_error *err) {
    if (fseeko(w->stream, (off_t)offset, SEEK_SET) != 0)
        return error_set_errno(err, "cannot write %s", w->path);
    tril_status st = file_writer_write(w, data, size, err);
    if (st == TRIL_OK && fseeko(w->stream, 0, SEEK_END) != 0)
        st = error_set_errno(err, "cannot write %s", w->path);
    return st;
}

/* Syncs the folder that holds `path`, so that a rename in it survives a crash. */
static tril_status parent_sync(const char *path, struct tril_error *err) {
    char *parent = strdup(path);
    if (!parent)
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory to write %s", path);
    char *slash = strrchr(parent, '/');
    if (slash)
        slash[slash == parent] = '\0';
    tril_status st = dir_sync(slash ? parent : ".", err);
    free(parent);
    return st;
}

tril_status file_writer_commit(struct file_writer *w, struct tril_error *err) {
    tril_status st = TRIL_OK;
    bool good = fflush(w->stream) == 0 && !ferror(w->stream);
    if (good && w->temporary)
        good = fsync(fileno(w->stream)) == 0;
    if (!good)
        st = error_set_errno(err, "cannot write %s", w->path);
    if (fclose(w->stream) != 0 && st == TRIL_OK)
        st = error_set_errno(err, "cannot write %s", w->path);
    if (w->temporary) {
        if (st == TRIL_OK && rename(w->temporary, w->path) != 0)
            st = error_set_errno(err, "cannot rename %s to %s", w->temporary, w->path);
        if (st != TRIL_OK)
            unlink(w->temporary);
        else
            st = parent_sync(w->path, err);
    }
    writer_free(w);
    return st;
}

void file_writer_abort(struct file_writer *w) {
    if (!w)
        return;
    fclose(w->stream);
    if (w->temporary)
        unlink(w->temporary);
    writer_free(w);
}

tril_status file_write_atomic(const char *path, const void *data, size_t size,
                              struct tril_error *err) {
    struct file_writer *w;
    tril_status st = file_writer_open(&w, path, err);
    if (st != TRIL_OK)
        return st;
    st = file_writer_write(w, data, size, err);
    if (st == TRIL_OK)
        return file_writer_commit(w, err);
    file_writer_abort(w);
    return st;
}

/* Paths and directories. */

bool path_exists(const char *path) {
    struct stat info;
    return stat(path, &info) == 0;
}

bool path_is_dir(const char *path) {
    struct stat info;
    return stat(path, &info) == 0 && S_ISDIR(info.st_mode);
}

bool path_same(const char *a, const char *b) {
    struct stat x, y;
    return stat(a, &x) == 0 && stat(b, &y) == 0 && x.st_dev == y.st_dev && x.st_ino == y.st_ino;
}

char *path_join(const char *dir, const char *name) {
    char *joined;
    size_t n = strlen(dir);
    const char *separator = n > 0 && dir[n - 1] == '/' ? "" : "/";
    return asprintf(&joined, "%s%s%s", dir, separator, name) < 0 ? NULL : joined;
}

tril_status dir_make(const char *path, struct tril_error *err) {
    tril_status st = TRIL_OK;
    char *part = strdup(path);
    if (!part)
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory to create %s", path);
    for (char *p = part + 1; st == TRIL_OK && part[0]; p++) {
        bool last = *p == '\0';
        if (*p != '/' && !last)
            continue;
        *p = '\0';
        if (mkdir(part, 0777) != 0 && !(errno == EEXIST && path_is_dir(part)))
            st = error_set_errno(err, "cannot create the directory %s", part);
        if (last)
            break;
        *p = '/';
    }
    if (part[0] == '\0')
        st = error_set(err, TRIL_ERR_ARGUMENT, "cannot create a directory without a name");
    free(part);
    return st;
}

tril_status dir_lock(const char *path, int *lock, struct tril_error *err) {
    *lock = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (*lock < 0)
        return error_set_errno(err, "cannot open %s", path);
    if (flock(*lock, LOCK_EX | LOCK_NB) == 0)
        return TRIL_OK;
    bool taken = errno == EWOULDBLOCK;
    dir_unlock(*lock);
    *lock = -1;
    if (!taken)
        return TRIL_OK;
    return error_set(err, TRIL_ERR_IO,
                     "another process is writing into %s: wait for it, or name another directory",
                     path);
}

void dir_unlock(int lock) {
    if (lock >= 0)
        close(lock);
}

tril_status dir_sync(const char *path, struct tril_error *err) {
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return error_set_errno(err, "cannot open the directory %s", path);
    tril_status st = TRIL_OK;
    /* Some file systems cannot sync a directory, and say so: nothing more can be done there. */
    if (fsync(fd) != 0 && errno != EINVAL && errno != ENOTSUP)
        st = error_set_errno(err, "cannot sync the directory %s", path);
    close(fd);
    return st;
}

/* Visits a directory that may hold directories down to `depth` levels below. First pass (remove
 * false): is there anything in it that we do not remove? Second pass: remove. */
static tril_status dir_remove_pass(const char *path, int depth, bool remove,
                                   struct tril_error *err) {
    char **names = NULL, *child = NULL;
    size_t count = 0;
    struct stat info;
    tril_status st = TRIL_OK;
    if (lstat(path, &info) != 0)
        return error_set_errno(err, "cannot remove %s", path);
    if (!S_ISDIR(info.st_mode))
        return error_set(err, TRIL_ERR_IO, "cannot remove %s: it is not a directory", path);
    TRY(dir_list(path, &names, &count, err));
    for (size_t i = 0; i < count; i++) {
        free(child);
        if (!(child = path_join(path, names[i]))) {
            st = error_set(err, TRIL_ERR_MEMORY, "not enough memory to remove %s", path);
            goto done;
        }
        if (lstat(child, &info) != 0) {
            st = error_set_errno(err, "cannot remove %s", child);
            goto done;
        }
        if (S_ISDIR(info.st_mode) && depth > 0) {
            TRY(dir_remove_pass(child, depth - 1, remove, err));
        } else if (!S_ISREG(info.st_mode)) {
            st = error_set(err, TRIL_ERR_IO,
                           "%s is not removed, because %s is not a file that belongs there", path,
                           child);
            goto done;
        } else if (remove && unlink(child) != 0) {
            st = error_set_errno(err, "cannot remove %s", child);
            goto done;
        }
    }
    if (remove && rmdir(path) != 0)
        st = error_set_errno(err, "cannot remove %s", path);
done:
    free(child);
    dir_list_free(names, count);
    return st;
}

tril_status dir_remove(const char *path, struct tril_error *err) {
    tril_status st = dir_remove_pass(path, 1, false, err);
    return st == TRIL_OK ? dir_remove_pass(path, 1, true, err) : st;
}

static int compare_names(const void *a, const void *b) {
    return strcmp(*(char *const *)a, *(char *const *)b);
}

tril_status dir_list(const char *path, char ***names, size_t *count, struct tril_error *err) {
    tril_status st = TRIL_OK;
    char **list = NULL;
    size_t used = 0, room = 0;
    struct dirent *entry;
    *names = NULL;
    *count = 0;
    DIR *dir = opendir(path);
    if (!dir)
        return error_set_errno(err, "cannot read the directory %s", path);
    while (errno = 0, (entry = readdir(dir)) != NULL) {
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
            continue;
        if (used == room) {
            size_t more = room ? 2 * room : 16;
            char **grown = reallocarray(list, more, sizeof *list);
            if (grown) {
                list = grown;
                room = more;
            }
        }
        if (used == room || !(list[used] = strdup(entry->d_name))) {
            st = error_set(err, TRIL_ERR_MEMORY, "not enough memory to list %s", path);
            goto done;
        }
        used++;
    }
    if (errno != 0) {
        st = error_set_errno(err, "cannot read the directory %s", path);
        goto done;
    }
    if (used > 0)
        qsort(list, used, sizeof *list, compare_names);
    *names = list;
    *count = used;
    list = NULL;
done:
    closedir(dir);
    if (list)
        dir_list_free(list, used);
    return st;
}

void dir_list_free(char **names, size_t count) {
    for (size_t i = 0; names && i < count; i++)
        free(names[i]);
    free(names);
}
