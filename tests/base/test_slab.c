/* Slabs: blocks are aligned, distinct and keep their contents; memory goes with the last block. */
#include "base/slab.h"

#include <stdint.h>
#include <string.h>

#include "support/support.h"

enum { BLOCKS = 40 };

static void test_blocks(void **state) {
    (void)state;
    static const size_t sizes[] = {1, 64, 100, 4096, 3 << 20};
    struct slab *slab[BLOCKS];
    unsigned char *block[BLOCKS];
    for (int i = 0; i < BLOCKS; i++) {
        size_t size = sizes[i % 5];
        void *p;
        assert_int_equal(slab_alloc(&slab[i], &p, size, "a test", NULL), TRIL_OK);
        block[i] = p;
        assert_int_equal((uintptr_t)p % 64, 0);
        memset(p, i, size);
    }
    for (int i = 0; i < BLOCKS; i += 2) /* others stay whole */
        slab_release(slab[i]);
    for (int i = 1; i < BLOCKS; i += 2)
        for (size_t k = 0; k < sizes[i % 5]; k++)
            assert_int_equal(block[i][k], i);
    for (int i = 1; i < BLOCKS; i += 2)
        slab_release(slab[i]);
    slab_release(NULL);
}

static void test_too_much(void **state) {
    (void)state;
    struct tril_error err;
    struct slab *slab = NULL;
    void *p = NULL;
    assert_int_equal(slab_alloc(&slab, &p, SIZE_MAX - 100, "a test", &err), TRIL_ERR_MEMORY);
    assert_null(slab);
    assert_int_equal(slab_alloc(&slab, &p, SIZE_MAX, "a test", &err), TRIL_ERR_MEMORY);
    assert_null(slab);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_blocks),
        cmocka_unit_test(test_too_much),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
