// ctest: timeout=300 levels
/* Every operation of the CPU backend against its reference, at the level that TRIL_CPU asks for:
 * all cases of the registry, some of them grown until threads share them; unaligned memory between
 * guard pages; the same bits with one thread and with two, and every time again. */
#include "support/support.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/threads.h"
#include "cpu/cpu.h"
#include "support/op_harness.h"

static struct op_context context;

static bool overridden(const struct op_info *info) {
    return backend_cpu()->table[info->id] != info->reference;
}

static int call(struct op_run *r, int threads, enum op_weight_mode mode, const char *what) {
    struct tril_error err = {0};
    threads_set(threads);
    tril_status st = op_run_call(r, &context, mode, &err);
    threads_set(0);
    if (st != TRIL_OK)
        fprintf(stderr, "%s: %s\n", what, err.message);
    return st != TRIL_OK;
}

/* Number of faults of one case. */
static int run_case(const struct op_info *info, int index, const struct op_case *c) {
    char what[512];
    snprintf(what, sizeof what, "%s", op_case_describe(info, index, c));
    struct op_run one, two, shifted;
    struct op_judge judge;
    int faults = 0;
    op_run_create(&one, info, c, PLACE_AT_END, false);
    op_run_create(&two, info, c, PLACE_AT_END, false);
    op_run_create(&shifted, info, c, PLACE_AFTER_START, false);
    if (!op_judge_create(&judge, &one)) {
        faults = 1;
        goto done;
    }
    faults += call(&one, 1, WEIGHT_PLAIN, what);
    faults += op_judge_count(&judge, &one, what);
    faults += call(&two, 2, WEIGHT_PLAIN, what);
    if (!op_run_same_bits(&one, &two)) {
        fprintf(stderr, "%s: one thread and two give different bits\n", what);
        faults++;
    }
    for (int again = 0; again < 2; again++) {
        op_run_restore(&two);
        faults += call(&two, 2, again ? WEIGHT_REFRESHED : WEIGHT_PLAIN, what);
        if (!op_run_same_bits(&one, &two)) {
            fprintf(stderr, "%s: %s gives different bits\n", what,
                    again ? "a refreshed weight" : "a second call");
            faults++;
        }
    }
    faults += call(&shifted, 2, WEIGHT_KEPT, what);
    faults += op_judge_count(&judge, &shifted, what);
done:
    op_judge_free(&judge);
    op_run_free(&one);
    op_run_free(&two);
    op_run_free(&shifted);
    return faults;
}

/* Makes the case `times` larger in its rows; false where that would take the reference too long. */
static bool grow(const struct op_info *info, struct op_case *c, int times) {
    double work = 0;
    c->size['N'] = c->size['N'] * times + 3;
    c->size['M'] = c->size['M'] * times + 3;
    for (int i = 0; i < info->arg_count; i++) {
        int64_t shape[TENSOR_MAX_RANK];
        op_case_shape(info, i, c, shape);
        work += (double)shape[0] * (double)shape[1] * (double)shape[2] * (double)shape[3];
    }
    if (c->size['I'])
        work = (double)c->size['N'] * (double)c->size['I'] * (double)c->size['O'];
    if (c->size['S'])
        work = (double)c->size['N'] * (double)c->size['M'] * (double)c->size['H'] *
               (double)c->size['d'];
    return work < 4e5;
}

static void check(const struct op_info *info) {
    struct op_case c;
    int cases = 0, faults = 0;
    for (int index = 0; info->test_case(index, &c); index++, cases++) {
        faults += run_case(info, index, &c);
        if (index % 5 == 0 && info->id != OP_ATTENTION_FORWARD &&
            info->id != OP_ATTENTION_PROBABILITIES && grow(info, &c, 61)) {
            faults += run_case(info, index, &c);
            cases++;
        }
        if (faults > 50)
            break;
    }
    if (faults)
        fail_msg("%s: %d faults in the first %d cases", info->name, faults, cases);
    printf("%s: %d cases\n", info->name, cases);
}

static void test_operations(void **state) {
    (void)state;
    const char *only = getenv("TRIL_TEST_OP"); /* while writing a kernel: part of a name */
    for (int id = 0; id < OP_COUNT; id++) {
        const struct op_info *info = op_info_get((enum op_id)id);
        if (only && !strstr(info->name, only))
            continue;
        if (overridden(info))
            check(info);
        else
            printf("%s: the reference\n", info->name);
    }
}

int main(void) {
    if (level_missing())
        return TEST_SKIP;
    if (op_context_init(&context, backend_cpu(), NULL) != TRIL_OK)
        return 1;
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_operations)};
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    op_context_free(&context);
    return failed;
}
