#include "support/op_backend.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "support/op_harness.h"
#include "support/support.h"

static struct op_context context;
static bool traveling;

static int call(struct op_run *r, enum op_weight_mode mode, const char *what) {
    struct tril_error err = {0};
    tril_status st = traveling ? op_run_call_there(r, &context, mode, &err)
                               : op_run_call(r, &context, mode, &err);
    if (st == TRIL_OK)
        st = context.backend->synchronise(&context, &err);
    if (st != TRIL_OK)
        fprintf(stderr, "%s: %s\n", what, err.message);
    return st != TRIL_OK;
}

#if defined(TEST_RACES)
/* Under the thread sanitizer, a hundred times slower: a few cases, and of these only calls, on
 * aligned memory and on other, for which kernels differ. The sanitizer is the judge. */
enum { FEW = 30 };
int op_backend_case(const struct op_info *info, int index, const struct op_case *c) {
    char what[512];
    int faults = 0;
    snprintf(what, sizeof what, "%s", op_case_describe(info, index, c));
    for (int shifted = 0; shifted < 2; shifted++) {
        struct op_run run;
        op_run_create(&run, info, c, shifted ? PLACE_AFTER_START : PLACE_AT_END, false);
        faults += call(&run, WEIGHT_PLAIN, what);
        op_run_free(&run);
    }
    return faults;
}
#else
enum { FEW = 1 << 30 };
int op_backend_case(const struct op_info *info, int index, const struct op_case *c) {
    char what[512];
    snprintf(what, sizeof what, "%s", op_case_describe(info, index, c));
    struct op_run one, shifted;
    struct op_judge judge;
    int faults = 0;
    op_run_create(&one, info, c, PLACE_AT_END, false);
    op_run_create(&shifted, info, c, PLACE_AFTER_START, false);
    if (!op_judge_create(&judge, &one)) {
        faults = 1;
    } else {
        struct op_run again;
        op_run_create(&again, info, c, PLACE_AT_END, false);
        faults += call(&one, WEIGHT_PLAIN, what);
        faults += op_judge_count(&judge, &one, what);
        faults += call(&again, WEIGHT_PLAIN, what);
        if (!op_run_same_bits(&one, &again)) {
            fprintf(stderr, "%s: a second call gives different bits\n", what);
            faults++;
        }
        faults += call(&shifted, WEIGHT_PLAIN, what);
        faults += op_judge_count(&judge, &shifted, what);
        op_run_free(&again);
    }
    op_judge_free(&judge);
    op_run_free(&one);
    op_run_free(&shifted);
    return faults;
}

#endif

/* The same case in fp16, where it is one in bf16: device backends take both. */
static bool as_fp16(const struct op_info *info, struct op_case *c) {
    bool changed = c->act == DT_BF16;
    if (changed)
        c->act = DT_F16;
    for (int i = 0; i < info->arg_count; i++)
        if (c->dtype[i] == DT_BF16 + 1) {
            c->dtype[i] = DT_F16 + 1;
            changed = true;
        }
    return changed;
}

static void check(const struct op_info *info) {
    struct op_case c;
    int cases = 0, faults = 0, all = 0;
    while (info->test_case(all, &c))
        all++;
    for (int index = 0; info->test_case(index, &c) && faults < 50; index++) {
        /* Multiples of the golden ratio fall everywhere, whatever the list goes round in. */
        if ((uint32_t)index * 2654435769u >= ((uint64_t)FEW << 32) / (uint64_t)all)
            continue;
        cases++;
        faults += op_backend_case(info, index, &c);
        if (as_fp16(info, &c)) {
            faults += op_backend_case(info, index, &c);
            cases++;
        }
    }
    if (faults)
        fail_msg("%s: %d faults in the first %d cases", info->name, faults, cases);
    printf("%s: %d cases\n", info->name, cases);
    fflush(stdout);
}

static void test_operations(void **state) {
    (void)state;
    const char *only = getenv("TRIL_TEST_OP");
    for (int id = 0; id < OP_COUNT; id++) {
        const struct op_info *info = op_info_get((enum op_id)id);
        if (only && !strstr(info->name, only))
            continue;
        if (context.backend->table[id] != info->reference)
            check(info);
        else
            printf("%s: the reference\n", info->name);
    }
}

int op_backend_open(const struct backend *b, bool travels) {
    struct tril_error err = {0};
    traveling = travels;
    tril_status st = op_context_init(&context, b, &err);
    if (st == TRIL_ERR_UNSUPPORTED) {
        printf("skipped: %s\n", err.message);
        return TEST_SKIP;
    }
    if (st != TRIL_OK) {
        fprintf(stderr, "%s\n", err.message);
        return 1;
    }
    return 0;
}

void op_backend_close(void) {
    op_context_free(&context);
}

int op_backend_test(const struct backend *b, bool travels) {
    int refused = op_backend_open(b, travels);
    if (refused)
        return refused;
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_operations)};
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    op_backend_close();
    return failed;
}
