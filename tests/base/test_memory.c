/* Checked sizes, aligned blocks, arenas. */
#include "base/memory.h"

#include <string.h>

#include "support/support.h"

static void test_sizes(void **state) {
    (void)state;
    size_t n = 7;
    assert_true(size_mul(3, 5, &n) && n == 15);
    assert_false(size_mul(SIZE_MAX / 2, 3, &n));
    assert_false(size_add(SIZE_MAX, 1, &n));
}

static void test_blocks(void **state) {
    (void)state;
    const size_t sizes[] = {0, 1, 63, 64, 65, 1000, 1 << 20};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        void *p, *q;
        assert_int_equal(mem_alloc(&p, sizes[i], "a test", NULL), TRIL_OK);
        assert_int_equal(mem_alloc_zero(&q, sizes[i], "a test", NULL), TRIL_OK);
        assert_non_null(p);
        assert_int_equal((uintptr_t)p % MEMORY_ALIGN, 0);
        assert_int_equal((uintptr_t)q % MEMORY_ALIGN, 0);
        memset(p, 0x5a, sizes[i]);
        for (size_t j = 0; j < sizes[i]; j++)
            assert_int_equal(((char *)q)[j], 0);
        mem_free(p);
        mem_free(q);
    }
    mem_free(NULL);
}

static void test_too_much(void **state) {
    (void)state;
    const size_t sizes[] = {SIZE_MAX, SIZE_MAX - 64, SIZE_MAX / 2, (size_t)1 << 50};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        struct tril_error err;
        void *p = &err;
        assert_int_equal(mem_alloc(&p, sizes[i], "the moon", &err), TRIL_ERR_MEMORY);
        assert_null(p);
        assert_non_null(strstr(err.message, "the moon"));
        assert_int_equal(mem_alloc_zero(&p, sizes[i], "the moon", NULL), TRIL_ERR_MEMORY);
    }
}

static void test_arena(void **state) {
    (void)state;
    struct arena a;
    size_t need = arena_block_size(100) + arena_block_size(0) + arena_block_size(64);
    assert_int_equal(arena_create(&a, need, true, "a test", NULL), TRIL_OK);
    for (int round = 0; round < 2; round++) {
        char *p[3] = {arena_take(&a, 100), arena_take(&a, 0), arena_take(&a, 64)};
        for (int i = 0; i < 3; i++) {
            assert_non_null(p[i]);
            assert_int_equal((uintptr_t)p[i] % MEMORY_ALIGN, 0);
        }
        assert_true(p[1] >= p[0] + 100 && p[2] > p[1]);
        for (int i = 0; i < 100; i++)
            assert_int_equal(p[0][i], round == 0 ? 0 : 3);
        memset(p[0], 3, 100);
        memset(p[2], 4, 64);
        assert_null(arena_take(&a, 1));
        arena_reset(&a);
    }
    assert_null(arena_take(&a, SIZE_MAX));
    assert_null(arena_take(&a, SIZE_MAX - 100));
    assert_int_equal(arena_block_size(SIZE_MAX - 1), SIZE_MAX);
    arena_free(&a);
    arena_free(&a);
    assert_null(arena_take(&a, 1));
    assert_int_equal(arena_create(&a, SIZE_MAX, false, "a test", NULL), TRIL_ERR_MEMORY);
    arena_free(&a);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_sizes),
        cmocka_unit_test(test_blocks),
        cmocka_unit_test(test_too_much),
        cmocka_unit_test(test_arena),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
