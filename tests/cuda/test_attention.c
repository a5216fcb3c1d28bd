// ctest: timeout=600
/* Attention on the emulated GPU over several tiles in both directions: the registry's cases made
 * larger, against the reference on doubles with the harness's derived tolerances. The emulated GPU
 * says that it has compute capability 8.0, so that no kernel made for a newer one steps in. */
#include "support/support.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda/cuda.h"
#include "ops/attention.h"
#include "ops/attention_cases.h"
#include "support/op_harness.h"

static struct op_context context;

struct larger {
    const char *label; /* the registry's case */
    enum dtype act;
    int n, m, h, k, d;
    int max_q; /* 0: not known */
};

static bool find_case(bool backward, const struct larger *l, struct op_case *c) {
    for (int i = 0; backward ? attention_backward_case(i, c) : attention_forward_case(i, c); i++) {
        if (strcmp(c->label, l->label) != 0)
            continue;
        struct attention_params p;
        memcpy(&p, c->params, sizeof p);
        p.scale = 1.0f / sqrtf((float)l->d);
        p.max_q = l->max_q;
        memcpy(c->params, &p, sizeof p);
        c->act = l->act;
        c->size['N'] = l->n;
        c->size['M'] = l->m;
        c->size['H'] = l->h;
        c->size['K'] = l->k;
        c->size['d'] = l->d;
        c->size['A'] = l->n + 1;
        c->size['U'] = l->m + 3;
        if (c->size['G'] > 1)
            c->size['G'] = l->h;
        if (c->size['P'] > 1)
            c->size['P'] = (l->m + 15) / 16 / c->size['S'];
        return true;
    }
    return false;
}

static int run(bool backward, const struct larger *l, enum op_placement placement) {
    const struct op_info *info =
        op_info_get(backward ? OP_ATTENTION_BACKWARD : OP_ATTENTION_FORWARD);
    struct op_case c;
    struct op_run one, two;
    struct op_judge judge;
    struct tril_error err = {0};
    char what[256];
    if (!find_case(backward, l, &c)) {
        fprintf(stderr, "the registry has no case '%s'\n", l->label);
        return 1;
    }
    snprintf(what, sizeof what, "%s %s N=%d M=%d H=%d K=%d d=%d %s", info->name, l->label, l->n,
             l->m, l->h, l->k, l->d, dtype_name(l->act));
    op_run_create(&one, info, &c, placement, false);
    op_run_create(&two, info, &c, placement, false);
    int faults = !op_judge_create(&judge, &one);
    if (!faults) {
        faults += op_run_call(&one, &context, WEIGHT_PLAIN, &err) != TRIL_OK;
        faults += op_run_call(&two, &context, WEIGHT_PLAIN, &err) != TRIL_OK;
        faults += context.backend->synchronise(&context, &err) != TRIL_OK;
        if (faults)
            fprintf(stderr, "%s: %s\n", what, err.message);
        else
            faults = op_judge_count(&judge, &one, what) + !op_run_same_bits(&one, &two);
        op_judge_free(&judge);
    }
    op_run_free(&one);
    op_run_free(&two);
    return faults;
}

static void run_all(bool backward, const struct larger *list, size_t count) {
    int faults = 0;
    for (size_t i = 0; i < count; i++)
        faults += run(backward, &list[i], i % 3 == 2 ? PLACE_AFTER_START : PLACE_AT_END);
    assert_int_equal(faults, 0);
}

static void test_forward(void **state) {
    (void)state;
    static const struct larger list[] = {
        {"causal bf16", DT_BF16, 150, 150, 2, 1, 64, 0},
        {"causal bf16", DT_BF16, 140, 140, 2, 2, 128, 0},
        {"causal bf16", DT_BF16, 139, 139, 2, 1, 80, 0},
        {"wide", DT_BF16, 70, 70, 1, 1, 256, 0},
        {"full", DT_BF16, 133, 197, 2, 1, 40, 0},
        {"dropout", DT_BF16, 140, 140, 2, 1, 24, 0},
        {"global", DT_BF16, 70, 170, 2, 2, 32, 0},
        {"strided", DT_BF16, 100, 170, 2, 1, 48, 0},
        {"rules by head", DT_BF16, 40, 60, 8, 2, 16, 0},
        {"packed", DT_BF16, 260, 260, 2, 2, 32, 0},
        {"window", DT_F32, 200, 200, 2, 1, 16, 0},
        {"causal", DT_F32, 140, 140, 2, 1, 100, 0},
    };
    run_all(false, list, sizeof list / sizeof *list);
}

/* Few rows against many keys: heads in one tile, keys cut. */
static void test_decode(void **state) {
    (void)state;
    static const struct larger list[] = {
        {"one row", DT_BF16, 1, 700, 8, 2, 128, 1},
        {"one row", DT_F32, 1, 700, 6, 2, 64, 1},
        {"one row", DT_BF16, 3, 515, 6, 1, 64, 3},
        {"paged", DT_BF16, 6, 960, 4, 2, 64, 2},
        {"paged window", DT_BF16, 3, 480, 4, 2, 32, 2},
        {"eight bits paged", DT_BF16, 3, 960, 4, 2, 64, 2},
        {"global", DT_BF16, 3, 600, 4, 2, 12, 3},
    };
    run_all(false, list, sizeof list / sizeof *list);
}

static void test_backward(void **state) {
    (void)state;
    static const struct larger list[] = {
        {"causal bf16", DT_BF16, 150, 150, 2, 1, 64, 0},
        {"causal bf16", DT_BF16, 140, 140, 2, 2, 128, 0},
        {"causal bf16", DT_BF16, 100, 100, 2, 1, 80, 0},
        {"wide", DT_BF16, 70, 70, 1, 1, 200, 0},
        {"full", DT_BF16, 70, 133, 2, 1, 40, 0},
        {"dropout", DT_BF16, 140, 140, 2, 1, 24, 0},
        {"dropout", DT_BF16, 80, 80, 2, 1, 72, 0},
        {"global", DT_BF16, 70, 100, 2, 2, 32, 0},
        {"strided", DT_BF16, 60, 100, 2, 1, 48, 0},
        {"packed", DT_BF16, 200, 200, 2, 1, 32, 0},
        {"window", DT_F32, 150, 150, 2, 1, 16, 0},
        {"causal", DT_F32, 90, 90, 2, 1, 100, 0},
    };
    run_all(true, list, sizeof list / sizeof *list);
}

/* The textbook's way, on every case of the registry that it takes. */
static void test_materialised(void **state) {
    (void)state;
    int faults = 0, ran = 0;
    for (int backward = 0; backward < 2; backward++) {
        const struct op_info *info =
            op_info_get(backward ? OP_ATTENTION_BACKWARD : OP_ATTENTION_FORWARD);
        struct op_case c;
        for (int i = 0; info->test_case(i, &c); i++) {
            struct attention_params p;
            struct op_run one;
            struct op_judge judge;
            struct tril_error err = {0};
            char what[128];
            memcpy(&p, c.params, sizeof p);
            p.implementation = ATTENTION_MATERIALISED;
            memcpy(c.params, &p, sizeof p);
            snprintf(what, sizeof what, "%s %s materialised", info->name, c.label);
            op_run_create(&one, info, &c, i % 2 ? PLACE_AFTER_START : PLACE_AT_END, false);
            if (op_judge_create(&judge, &one)) {
                tril_status st = op_run_call(&one, &context, WEIGHT_PLAIN, &err);
                if (st == TRIL_OK)
                    st = context.backend->synchronise(&context, &err);
                if (st == TRIL_OK)
                    faults += op_judge_count(&judge, &one, what);
                else if (st != TRIL_ERR_UNSUPPORTED)
                    faults += fprintf(stderr, "%s: %s\n", what, err.message) > 0;
                ran += st == TRIL_OK;
                op_judge_free(&judge);
            }
            op_run_free(&one);
        }
    }
    assert_int_equal(faults, 0);
    assert_true(ran > 30);
}

int main(void) {
    setenv("TRIL_EMULATED_CAPABILITY", "80", 1);
    if (op_context_init(&context, backend_cuda(), NULL) != TRIL_OK)
        return 1;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_forward),
        cmocka_unit_test(test_decode),
        cmocka_unit_test(test_backward),
        cmocka_unit_test(test_materialised),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    op_context_free(&context);
    return failed;
}
