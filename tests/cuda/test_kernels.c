// ctest: timeout=300
/* Kernels that no case of the registry reaches: with the registry's, all that use neither tensor
 * cores nor bulk copies have run, which is what the thread sanitizer is to see. Judged as the
 * registry's cases are (support/op_harness.h). */
#include "support/support.h"

#include "cuda/cuda.h"
#include "ops/attention.h"
#include "support/op_backend.h"
#include "support/op_harness.h"

static void judge(enum op_id id, const struct op_case *c) {
    int faults = op_backend_case(op_info_get(id), 0, c);
    if (faults)
        fail_msg("%s: %d faults", op_info_get(id)->name, faults);
}

/* The case of an operation that has this label. */
static struct op_case labelled(enum op_id id, const char *label) {
    struct op_case c;
    for (int i = 0; op_info_get(id)->test_case(i, &c); i++)
        if (strcmp(c.label, label) == 0)
            return c;
    fail_msg("%s has no case '%s'", op_info_get(id)->name, label);
    return c;
}

/* The textbook's attention: fp32, and 16 bits with grouped heads. */
static void test_materialised(void **state) {
    static const char *const labels[] = {"full", "causal bf16"};
    (void)state;
    for (int backward = 0; backward < 2; backward++)
        for (int i = 0; i < 2; i++) {
            const enum op_id id = backward ? OP_ATTENTION_BACKWARD : OP_ATTENTION_FORWARD;
            struct op_case c = labelled(id, labels[i]);
            struct attention_params p;
            memcpy(&p, c.params, sizeof p);
            p.implementation = ATTENTION_MATERIALISED;
            memcpy(c.params, &p, sizeof p);
            judge(id, &c);
        }
}

/* Tables of two dtypes. */
static void test_embed(void **state) {
    (void)state;
    struct op_case c = labelled(OP_EMBED_FORWARD, "tokens and positions");
    c.size['N'] = 9;
    c.size['D'] = 24;
    c.size['V'] = c.size['C'] = 5;
    c.dtype[op_arg_find(op_info_get(OP_EMBED_FORWARD), "wte")] = DT_BF16 + 1;
    c.dtype[op_arg_find(op_info_get(OP_EMBED_FORWARD), "wpe")] = DT_F32 + 1;
    judge(OP_EMBED_FORWARD, &c);
}

/* A product in fp32, and then what is done to it in 16 bits. */
static void test_two_passes(void **state) {
    (void)state;
    struct op_case c = labelled(OP_LINEAR_FORWARD, "bias, gelu, pre kept");
    c.act = DT_BF16;
    c.size['N'] = 20;
    c.size['I'] = 16;
    c.size['O'] = 32;
    judge(OP_LINEAR_FORWARD, &c);
}

/* A recurrence's state that several blocks of columns read. */
static void test_normaliser(void **state) {
    (void)state;
    struct op_case c;
    op_info_get(OP_LINEAR_ATTENTION_FORWARD)->test_case(2, &c);
    c.size['N'] = 3;
    c.size['d'] = 66;
    judge(OP_LINEAR_ATTENTION_FORWARD, &c);
}

int main(void) {
    int refused = op_backend_open(backend_cuda(), false);
    if (refused)
        return refused;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_materialised),
        cmocka_unit_test(test_embed),
        cmocka_unit_test(test_two_passes),
        cmocka_unit_test(test_normaliser),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    op_backend_close();
    return failed;
}
