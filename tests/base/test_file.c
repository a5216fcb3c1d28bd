/* Files: what is read and refused, atomic writes (a full disk included), directories. */
#include "base/file.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "support/support.h"

static void write_file(const char *path, const char *text) {
    assert_int_equal(file_write_atomic(path, text, strlen(text), NULL), TRIL_OK);
}

static void assert_content(const char *path, const char *text) {
    char *data;
    size_t size;
    assert_int_equal(file_read(path, 1 << 20, &data, &size, NULL), TRIL_OK);
    assert_int_equal(size, strlen(text));
    assert_string_equal(data, text);
    free(data);
}

static void test_read(void **state) {
    (void)state;
    struct tril_error err;
    char *data = &(char){0};
    size_t size;
    const char *path = test_path("read");
    write_file(path, "hello");
    assert_content(path, "hello");
    assert_int_equal(file_read(path, 5, &data, &size, &err), TRIL_OK);
    free(data);
    assert_int_equal(file_read(path, 4, &data, &size, &err), TRIL_ERR_FORMAT);
    assert_null(data);
    assert_non_null(strstr(err.message, path));
    write_file(path, "");
    assert_content(path, "");
    assert_int_equal(file_read(test_dir(), 100, &data, &size, &err), TRIL_ERR_IO);
    assert_non_null(strstr(err.message, "directory"));
    assert_int_equal(file_read("/dev/zero", 100, &data, &size, &err), TRIL_ERR_IO);
    assert_int_equal(file_read(test_path("absent"), 100, &data, &size, &err), TRIL_ERR_IO);
    assert_int_equal(mkfifo(test_path("pipe"), 0600), 0); /* must not wait for a writer */
    assert_int_equal(file_read(test_path("pipe"), 100, &data, &size, &err), TRIL_ERR_IO);
}

static void test_stream(void **state) {
    (void)state;
    int fds[2];
    char *data;
    size_t size;
    const size_t total = 200000;
    char *text = malloc(total);
    assert_non_null(text);
    memset(text, 'x', total);
    for (int limited = 0; limited < 2; limited++) {
        assert_int_equal(pipe(fds), 0);
        pid_t child = fork();
        if (child == 0) {
            signal(SIGPIPE, SIG_DFL);
            close(fds[0]);
            for (size_t done = 0; done < total;) {
                ssize_t n = write(fds[1], text + done, total - done);
                if (n < 0)
                    break;
                done += (size_t)n;
            }
            _exit(0);
        }
        close(fds[1]);
        tril_status st =
            file_read_stream(fds[0], "stdin", limited ? total - 1 : total, &data, &size, NULL);
        close(fds[0]);
        waitpid(child, NULL, 0);
        assert_int_equal(st, limited ? TRIL_ERR_FORMAT : TRIL_OK);
        if (!limited) {
            assert_int_equal(size, total);
            assert_memory_equal(data, text, total);
            assert_int_equal(data[size], 0);
        }
        free(data);
    }
    free(text);
}

static void test_map(void **state) {
    (void)state;
    struct file_map m;
    const char *path = test_path("map");
    write_file(path, "mapped");
    assert_int_equal(file_map_open(&m, path, NULL), TRIL_OK);
    assert_int_equal(m.size, 6);
    assert_memory_equal(m.data, "mapped", 6);
    assert_true(m.mtime_ns > 0);
    file_map_close(&m);
    file_map_close(&m);
    write_file(path, "");
    assert_int_equal(file_map_open(&m, path, NULL), TRIL_OK);
    assert_true(m.size == 0 && m.data == NULL);
    file_map_close(&m);
    assert_int_equal(file_map_open(&m, test_dir(), NULL), TRIL_ERR_IO);
    assert_int_equal(file_map_open(&m, test_path("absent"), NULL), TRIL_ERR_IO);
}

static int entries(const char *dir) {
    char **names;
    size_t count;
    assert_int_equal(dir_list(dir, &names, &count, NULL), TRIL_OK);
    dir_list_free(names, count);
    return (int)count;
}

static void test_atomic(void **state) {
    (void)state;
    struct file_writer *w;
    const char *dir = test_path("atomic"), *path = test_path("atomic/file");
    assert_int_equal(dir_make(dir, NULL), TRIL_OK);
    write_file(path, "old");
    assert_int_equal(chmod(path, 0600), 0);
    assert_int_equal(file_writer_open(&w, path, NULL), TRIL_OK);
    assert_int_equal(file_writer_write(w, "ne", 2, NULL), TRIL_OK);
    assert_content(path, "old"); /* until the commit */
    assert_int_equal(file_writer_write(w, "w", 1, NULL), TRIL_OK);
    assert_int_equal(file_writer_commit(w, NULL), TRIL_OK);
    assert_content(path, "new");
    struct stat info;
    assert_int_equal(stat(path, &info), 0);
    assert_int_equal(info.st_mode & 0777, 0600);
    assert_int_equal(file_writer_open(&w, path, NULL), TRIL_OK);
    assert_int_equal(file_writer_write(w, "lost", 4, NULL), TRIL_OK);
    file_writer_abort(w);
    file_writer_abort(NULL);
    assert_content(path, "new");
    assert_int_equal(entries(dir), 1);
    assert_int_equal(file_writer_open(&w, dir, NULL), TRIL_ERR_IO);
    assert_int_equal(file_writer_open(&w, test_path("absent/file"), NULL), TRIL_ERR_IO);
    /* Devices are written in place, and stay devices. */
    write_file("/dev/null", "gone");
    assert_int_equal(stat("/dev/null", &info), 0);
    assert_true(S_ISCHR(info.st_mode));
}

/* A limit on the size of files stands in for a full disk. */
static void test_full_disk(void **state) {
    (void)state;
    const char *dir = test_path("full"), *path = test_path("full/file");
    assert_int_equal(dir_make(dir, NULL), TRIL_OK);
    write_file(path, "old");
    struct rlimit before, small;
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &before), 0);
    small = before;
    small.rlim_cur = 4096;
    void (*handler)(int) = signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
    char *big = calloc(1, 1 << 20);
    struct tril_error err = {0};
    tril_status st = file_write_atomic(path, big, 1 << 20, &err);
    tril_status st_small = file_write_atomic(path, big, 5000, NULL); /* fails at the flush */
    setrlimit(RLIMIT_FSIZE, &before);
    signal(SIGXFSZ, handler);
    free(big);
    assert_int_equal(st, TRIL_ERR_IO);
    assert_int_equal(st_small, TRIL_ERR_IO);
    assert_non_null(strstr(err.message, path));
    assert_content(path, "old");
    assert_int_equal(entries(dir), 1);
}

static void test_directories(void **state) {
    (void)state;
    struct tril_error err;
    assert_int_equal(dir_make(test_path("a/b/c"), NULL), TRIL_OK);
    assert_int_equal(dir_make(test_path("a/b/c/"), NULL), TRIL_OK);
    assert_true(path_is_dir(test_path("a/b/c")) && path_exists(test_path("a")));
    write_file(test_path("a/f"), "f");
    assert_true(path_same(test_path("a/f"), test_path("a/b/../f")));
    assert_false(path_same(test_path("a/f"), test_path("a")));
    assert_false(path_same(test_path("a/none"), test_path("a/none")));
    assert_true(path_exists(test_path("a/f")) && !path_is_dir(test_path("a/f")));
    assert_int_equal(dir_make(test_path("a/f/g"), &err), TRIL_ERR_IO);
    assert_int_equal(dir_make("", NULL), TRIL_ERR_ARGUMENT);
    assert_int_equal(dir_make("/", NULL), TRIL_OK);

    char **names;
    size_t count;
    assert_int_equal(dir_list(test_path("a"), &names, &count, NULL), TRIL_OK);
    assert_int_equal(count, 2);
    assert_string_equal(names[0], "b");
    assert_string_equal(names[1], "f");
    dir_list_free(names, count);
    assert_int_equal(dir_list(test_path("absent"), &names, &count, NULL), TRIL_ERR_IO);
    dir_list_free(names, count);

    char *joined = path_join("x", "y"), *slash = path_join("/", "y");
    assert_string_equal(joined, "x/y");
    assert_string_equal(slash, "/y");
    free(joined);
    free(slash);
    assert_int_equal(dir_sync(test_dir(), NULL), TRIL_OK);
}

static void test_remove(void **state) {
    (void)state;
    struct tril_error err;
    assert_int_equal(dir_make(test_path("r/sub"), NULL), TRIL_OK);
    write_file(test_path("r/one"), "1");
    write_file(test_path("r/sub/two"), "2");
    assert_int_equal(dir_remove(test_path("r"), NULL), TRIL_OK);
    assert_false(path_exists(test_path("r")));

    /* Anything unexpected, and nothing at all is removed. */
    assert_int_equal(dir_make(test_path("s/sub"), NULL), TRIL_OK);
    write_file(test_path("s/a"), "a");
    assert_int_equal(symlink("/etc", test_path("s/sub/z")), 0);
    assert_int_equal(dir_remove(test_path("s"), &err), TRIL_ERR_IO);
    assert_true(path_exists(test_path("s/a")));
    assert_int_equal(dir_make(test_path("t/sub/deep"), NULL), TRIL_OK);
    assert_int_equal(dir_remove(test_path("t"), NULL), TRIL_ERR_IO);
    assert_int_equal(symlink(test_path("t"), test_path("u")), 0);
    assert_int_equal(dir_remove(test_path("u"), NULL), TRIL_ERR_IO);
    assert_int_equal(dir_remove(test_path("absent"), NULL), TRIL_ERR_IO);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_read),      cmocka_unit_test(test_stream),
        cmocka_unit_test(test_map),       cmocka_unit_test(test_atomic),
        cmocka_unit_test(test_full_disk), cmocka_unit_test(test_directories),
        cmocka_unit_test(test_remove),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
