/* Learning-rate schedules against their formulas at the corners. */
#include "support/support.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "train/options.h"
#include "train/schedule.h"

static void test_warm_up_and_cosine(void **state) {
    struct schedule s = {
        .kind = SCHEDULE_COSINE, .lr = 1e-3, .min_lr = 1e-4, .warmup = 10, .steps = 110};
    (void)state;
    assert_true(fabs(schedule_rate(&s, 0) - 1e-4) < 1e-12);
    assert_true(fabs(schedule_rate(&s, 9) - 1e-3) < 1e-12);
    assert_true(fabs(schedule_rate(&s, 10) - 1e-3) < 1e-12);
    assert_true(fabs(schedule_rate(&s, 60) - 5.5e-4) < 1e-12); /* half way: the mean */
    for (int64_t t = 11; t < 110; t++)
        assert_true(schedule_rate(&s, t) < schedule_rate(&s, t - 1));
    assert_true(schedule_rate(&s, 109) > 1e-4 && schedule_rate(&s, 1000) >= 1e-4);
}

static void test_linear_and_constant(void **state) {
    struct schedule s = {.kind = SCHEDULE_LINEAR, .lr = 1, .min_lr = 0, .warmup = 0, .steps = 4};
    (void)state;
    for (int t = 0; t < 4; t++)
        assert_true(fabs(schedule_rate(&s, t) - (1 - t / 4.0)) < 1e-12);
    s.kind = SCHEDULE_CONSTANT;
    assert_true(schedule_rate(&s, 3) == 1);
}

static void test_names(void **state) {
    enum schedule_kind k;
    struct tril_error err;
    (void)state;
    assert_int_equal(schedule_parse(&k, "linear", &err), TRIL_OK);
    assert_int_equal(k, SCHEDULE_LINEAR);
    assert_int_equal(schedule_parse(&k, "wavy", &err), TRIL_ERR_ARGUMENT);
    assert_non_null(strstr(err.message, "wavy"));
}

/* Options survive JSON, and a resumed run is held to what it saw. */
static void test_options_round_trip(void **state) {
    struct tril_train_options o = train_options_defaults(), back;
    struct tril_error err = {0};
    const char *const data[] = {"a.txt", "b.txt"};
    const char **paths;
    (void)state;
    o.data = data;
    o.data_count = 2;
    o.lr = 0.1 + 0.2; /* needs all of its digits */
    o.seed = UINT64_MAX - 5;
    o.marker = "***";
    o.overrides.norm = "rmsnorm";
    o.overrides.layers = 7;
    o.mask_documents = true;
    json_t *first = train_options_to_json(&o);
    char *text = json_dumps(first, 0);
    json_t *parsed = json_loads(text, 0, NULL);
    assert_int_equal(train_options_from_json(&back, parsed, &paths, "x", &err), TRIL_OK);
    assert_int_equal(back.data_count, 2);
    assert_string_equal(back.data[1], "b.txt");
    assert_true(back.lr == o.lr && back.seed == o.seed && back.mask_documents);
    assert_string_equal(back.overrides.norm, "rmsnorm");
    json_t *second = train_options_to_json(&back);
    assert_true(json_equal(first, second));
    assert_int_equal(train_options_check_resume(first, second, "x", &err), TRIL_OK);
    back.grad_accum = 3;
    json_t *other = train_options_to_json(&back);
    assert_int_equal(train_options_check_resume(first, other, "x", &err), TRIL_ERR_ARGUMENT);
    assert_non_null(strstr(err.message, "--grad-accum"));
    back.grad_accum = o.grad_accum;
    back.steps = 99; /* may change */
    json_t *longer = train_options_to_json(&back);
    assert_int_equal(train_options_check_resume(first, longer, "x", &err), TRIL_OK);
    json_decref(first);
    json_decref(second);
    json_decref(other);
    json_decref(longer);
    json_decref(parsed);
    free(text);
    free(paths);
}

static void test_options_are_checked(void **state) {
    struct tril_error err = {0};
    const char *const data[] = {"a.txt"};
    struct tril_train_options good = train_options_defaults(), o;
    (void)state;
    good.data = data;
    good.data_count = 1;
    good.out = "out";
    assert_int_equal(train_options_check(&good, &err), TRIL_OK);
#define REFUSES(change, words)                                                                     \
    do {                                                                                           \
        o = good;                                                                                  \
        change;                                                                                    \
        assert_int_equal(train_options_check(&o, &err), TRIL_ERR_ARGUMENT);                        \
        assert_non_null(strstr(err.message, words));                                               \
    } while (0)
    REFUSES(o.out = NULL, "--out");
    REFUSES(o.data_count = 0, "--data");
    REFUSES(o.batch = 0, "--batch");
    REFUSES((o.batch = 65536, o.seq = 1 << 20), "--batch times --seq");
    REFUSES(o.lr = NAN, "--lr");
    REFUSES(o.lr = -1, "--lr");
    REFUSES((o.steps = 1, o.epochs = 1), "exclude");
    REFUSES((o.model = "m", o.preset = "gpt2"), "--preset");
    REFUSES(o.dtype = "fp8", "fp8");
    REFUSES(o.schedule = "wavy", "wavy");
    REFUSES(o.recompute = "some", "some");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_warm_up_and_cosine),
        cmocka_unit_test(test_linear_and_constant),
        cmocka_unit_test(test_names),
        cmocka_unit_test(test_options_round_trip),
        cmocka_unit_test(test_options_are_checked),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
