// ctest: timeout=600
/* Linear, relative and memory attention and retrieval on the CUDA backend at sizes that the
 * registry's cases do not reach: several blocks of 64 channels, more sequences than a warp has
 * lanes, short and long ones together, a memory that several blocks share, lists that are cut again
 * and again, and ties, which 8-bit mantissas in one channel give in plenty. Judged as the
 * registry's cases are (support/op_harness.h). On a GPU with the least shared memory that there
 * is. */
#include "support/support.h"

#include <stdlib.h>

#include "cuda/cuda.h"
#include "ops/describe.h"
#include "support/op_backend.h"

/* Case `index` of an operation, to be changed. */
static struct op_case like(enum op_id id, int index) {
    struct op_case c;
    if (!op_info_get(id)->test_case(index, &c))
        fail_msg("%s has no case %d", op_info_get(id)->name, index);
    return c;
}
static void judge(enum op_id id, int index, const struct op_case *c) {
    int faults = op_backend_case(op_info_get(id), index, c);
    if (faults)
        fail_msg("%s: %d faults", op_info_get(id)->name, faults);
}

static void linear(int index, int64_t n, int64_t s, int64_t d) {
    const enum op_id ids[] = {OP_LINEAR_ATTENTION_FORWARD, OP_LINEAR_ATTENTION_BACKWARD};
    for (int i = 0; i < 2; i++) {
        struct op_case c = like(ids[i], index);
        c.size['N'] = n;
        c.size['S'] = s;
        c.size['d'] = d;
        judge(ids[i], index, &c);
    }
}

static void test_linear(void **state) {
    (void)state;
    linear(2, 150, 2, 70);  /* two blocks of channels; a state and grouped heads; gaps */
    linear(5, 90, 40, 9);   /* 40 sequences of 0 to 4 rows */
    linear(2, 300, 35, 12); /* 35 sequences of 0 to 16 rows: both ways in one call */
    linear(4, 140, 2, 66);  /* not causal, two blocks of channels */
    linear(7, 3, 2, 130);   /* the recurrence with three blocks of columns, bf16 */
}

/* The state after the last row may lie where the one before the first did. */
static void test_state_in_place(void **state) {
    (void)state;
    const int64_t rows[] = {3, 80}, widths[] = {130, 66};
    for (int i = 0; i < 2; i++) {
        struct op_case c = like(OP_LINEAR_ATTENTION_FORWARD, 2);
        const struct op_info *info = op_info_get(OP_LINEAR_ATTENTION_FORWARD);
        c.size['N'] = rows[i];
        c.size['d'] = widths[i];
        for (int a = 0; a < info->arg_count; a++)
            if (!strcmp(info->args[a].name, "next"))
                for (int b = 0; b < info->arg_count; b++)
                    if (!strcmp(info->args[b].name, "state"))
                        c.alias[a] = (unsigned char)(b + 1);
        judge(info->id, 2, &c);
    }
}

static void relative(int index, int64_t n, int64_t past, int64_t s, int64_t d) {
    const enum op_id ids[] = {OP_RELATIVE_ATTENTION_FORWARD, OP_RELATIVE_ATTENTION_BACKWARD};
    for (int i = 0; i < 2; i++) {
        struct op_case c = like(ids[i], index);
        c.size['N'] = n;
        c.size['P'] = past;
        c.size['M'] = n + past;
        c.size['S'] = s;
        c.size['d'] = d;
        judge(ids[i], index, &c);
    }
}

static void test_relative(void **state) {
    (void)state;
    relative(1, 70, 61, 1, 70); /* two blocks of channels, grouped heads, a past, gaps */
    relative(4, 90, 80, 36, 3); /* 36 sequences */
    relative(2, 190, 0, 1, 3);  /* segments of 4 that see 6 before: far tiles are never looked at */
}

static void memory(int index, const int64_t size[5], struct memory_attention_params p) {
    const enum op_id ids[] = {OP_MEMORY_ATTENTION_FORWARD, OP_MEMORY_ATTENTION_BACKWARD};
    for (int i = 0; i < 2; i++) {
        struct op_case c = like(ids[i], index);
        c.size['N'] = size[0];
        c.size['M'] = size[1];
        c.size['S'] = size[2];
        c.size['d'] = size[3];
        c.size['T'] = size[4];
        p.ring = size[1] / size[2];
        memcpy(c.params, &p, sizeof p);
        judge(ids[i], index, &c);
    }
}

static void test_memory(void **state) {
    (void)state;
    const struct memory_attention_params all = {.scale = 1}, some = {.scale = 0.25f, .segment = 7};
    /* Cases 5 (one row, fp32) and 7 (bf16). */
    memory(5, (const int64_t[]){1, 2100, 1, 6, 3}, all); /* eight blocks share a memory */
    for (int64_t top = 97; top < 400; top += 107)        /* and scores at the threshold tie */
        memory(7, (const int64_t[]){1, 1500, 1, 1, top}, all);
    memory(7, (const int64_t[]){70, 900, 1, 1, 5}, all);   /* ties in lists cut many times */
    memory(7, (const int64_t[]){9, 1400, 1, 4, 500}, all); /* lists that few rows of a block fill */
    memory(7, (const int64_t[]){80, 300, 40, 70, 4}, some);
}

static void retrieving(int index, const int64_t size[5], struct retrieve_params p) {
    struct op_case c = like(OP_RETRIEVE, index);
    c.size['N'] = size[0];
    c.size['M'] = size[1];
    c.size['H'] = size[2];
    c.size['K'] = size[3];
    c.size['d'] = size[4];
    c.size['B'] = size[1] / p.block + 1;
    c.size['T'] = p.first + p.last + p.top + 1;
    memcpy(c.params, &p, sizeof p);
    judge(OP_RETRIEVE, index, &c);
}

static void test_retrieve(void **state) {
    (void)state;
    /* Cases 0 (fp32), 4 (bf16, gaps). */
    retrieving(
        0, (const int64_t[]){1, 900, 2, 1, 140},
        (struct retrieve_params){.scale = 0.1f, .block = 4, .first = 1, .last = 2, .top = 90});
    retrieving(4, (const int64_t[]){2, 1200, 3, 3, 1}, /* bounds that tie */
               (struct retrieve_params){.scale = 1, .block = 1, .first = 0, .last = 1, .top = 200});
    retrieving(
        4, (const int64_t[]){3, 700, 4, 2, 100},
        (struct retrieve_params){.scale = 0.1f, .block = 16, .first = 1, .last = 1, .top = 5});
}

int main(void) {
    setenv("TRIL_EMULATED_CAPABILITY", "89", 1);
    int refused = op_backend_open(backend_cuda(), false);
    if (refused)
        return refused;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_linear),   cmocka_unit_test(test_state_in_place),
        cmocka_unit_test(test_relative), cmocka_unit_test(test_memory),
        cmocka_unit_test(test_retrieve),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    op_backend_close();
    return failed;
}
