/* Views of tensors, the op context and its scratch, the reference backend's table. */
#include "support/support.h"

#include <string.h>

#include "base/error.h"
#include "ops/ops.h"

static void test_views(void **state) {
    (void)state;
    float x[4 * 6];
    for (int i = 0; i < 24; i++)
        x[i] = (float)i;
    struct tensor t = tensor_2d(x, DT_F32, 4, 6);
    assert_true(tensor_is_dense(&t));
    assert_int_equal(tensor_count(&t), 24);
    assert_int_equal(tensor_bytes(&t), 96);

    struct tensor rows = tensor_rows(t, 1, 2);
    assert_true(rows.data == x + 6 && rows.shape[0] == 2 && tensor_is_dense(&rows));

    struct tensor columns = tensor_columns(t, 2, 3);
    assert_true(columns.data == x + 2 && columns.shape[1] == 3 && columns.stride[0] == 6);
    assert_false(tensor_is_dense(&columns));
    struct tensor one = tensor_rows(columns, 3, 1); /* the stride of a single row does not matter */
    assert_true(tensor_is_dense(&one));

    struct tensor heads = tensor_heads(tensor_columns(t, 0, 4), 2);
    assert_int_equal(heads.rank, 3);
    assert_true(heads.shape[1] == 2 && heads.shape[2] == 2);
    assert_true(heads.stride[0] == 6 && heads.stride[1] == 2 && heads.stride[2] == 1);

    struct tensor none = tensor_none();
    assert_int_equal(tensor_count(&none), 0);
    struct tensor shape_only = tensor_2d(NULL, DT_F32, 4, 6);
    assert_int_equal(tensor_count(&shape_only), 0);
    assert_null(tensor_rows(shape_only, 2, 1).data);
    struct tensor empty = tensor_2d(x, DT_F32, 0, 6);
    assert_true(tensor_is_dense(&empty));
}

static void test_context(void **state) {
    (void)state;
    struct op_context ctx;
    struct tril_error err = {0};
    assert_int_equal(op_context_init(&ctx, NULL, &err), TRIL_ERR_INTERNAL);
    struct backend partial = *backend_reference();
    partial.name = "partial";
    partial.table[OP_CAST] = NULL;
    assert_int_equal(op_context_init(&ctx, &partial, &err), TRIL_ERR_INTERNAL);
    assert_non_null(strstr(err.message, "partial has no cast"));

    assert_int_equal(op_context_init(&ctx, backend_reference(), &err), TRIL_OK);
    char *a = op_scratch(&ctx, 100);
    assert_non_null(a);
    assert_int_equal((uintptr_t)a % 64, 0);
    memset(a, 1, 100);
    assert_ptr_equal(op_scratch(&ctx, 50), a);
    assert_int_equal(ctx.scratch_bytes, 100);
    char *b = op_scratch(&ctx, 1 << 20);
    assert_non_null(b);
    memset(b, 1, 1 << 20);
    assert_null(op_scratch(&ctx, -1));
    op_context_free(&ctx);
    op_context_free(&ctx);
    assert_null(ctx.scratch);
}

static void test_backend(void **state) {
    (void)state;
    const struct backend *b = backend_reference();
    assert_ptr_equal(b, backend_reference());
    for (int id = 0; id < OP_COUNT; id++)
        assert_true(b->table[id] == op_info_get((enum op_id)id)->reference);
    void *p = NULL;
    struct tril_error err = {0};
    assert_int_equal(b->alloc(&p, -1, false, "nothing", &err), TRIL_ERR_ARGUMENT);
    assert_int_equal(b->alloc(&p, 16, true, "a block", &err), TRIL_OK);
    float in[4] = {1, 2, 3, 4}, out[4];
    struct op_context ctx = {.backend = b};
    assert_int_equal(b->download(&ctx, out, p, 16, &err), TRIL_OK);
    assert_true(out[0] == 0 && out[3] == 0);
    assert_int_equal(b->upload(&ctx, p, in, 16, &err), TRIL_OK);
    assert_int_equal(b->fill_zero(&ctx, (float *)p + 1, 4, &err), TRIL_OK);
    assert_int_equal(b->download(&ctx, out, p, 16, &err), TRIL_OK);
    assert_true(out[0] == 1 && out[1] == 0 && out[2] == 3);
    assert_int_equal(b->synchronise(&ctx, &err), TRIL_OK);
    b->release(p);
}

/* A released static weight is refused with a sentence, not read. */
static void test_missing_weight(void **state) {
    (void)state;
    struct op_context ctx = {.backend = backend_reference()};
    struct tril_error err = {0};
    float x[2] = {1, 2}, y[3];
    struct weight w = {.value = tensor_2d(NULL, DT_F32, 3, 2)};
    tril_status st =
        linear_forward(&ctx, tensor_2d(x, DT_F32, 1, 2), &w, tensor_none(), tensor_none(),
                       tensor_2d(y, DT_F32, 1, 3), tensor_none(), ACT_NONE, &err);
    assert_int_equal(st, TRIL_ERR_ARGUMENT);
    assert_non_null(strstr(err.message, "argument w is missing"));
    w.state = &w; /* prepared, values gone */
    st = linear_forward(&ctx, tensor_2d(x, DT_F32, 1, 2), &w, tensor_none(), tensor_none(),
                        tensor_2d(y, DT_F32, 1, 3), tensor_none(), ACT_NONE, &err);
    assert_int_equal(st, TRIL_ERR_UNSUPPORTED);
}

/* Counting bytes: read and written arguments twice, tables only where they are touched. */
static void test_bytes(void **state) {
    (void)state;
    float x[8], y[8];
    double total;
    struct tensor args[2] = {tensor_1d(x, DT_F32, 8), tensor_1d(y, DT_F32, 8)};
    assert_true(op_bytes(OP_CAST, args, NULL) == 64);
    struct accumulate_params p = {1};
    assert_true(op_bytes(OP_ACCUMULATE, args, &p) == 96);
    args[1] = tensor_1d(&total, DT_F64, 1);
    assert_true(op_bytes(OP_SUM_SQUARES, args, NULL) == 48);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_views),   cmocka_unit_test(test_context),
        cmocka_unit_test(test_backend), cmocka_unit_test(test_missing_weight),
        cmocka_unit_test(test_bytes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
