// ctest: timeout=60
/* Visibility rules: 64 keys at a time and rectangles against the plain definition over random
 * rules; and rules from text. */
#include "support/support.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/random.h"
#include "ops/visible.h"

/* Numbers of one random case, drawn in order. */
struct dice {
    struct random_key key;
    uint64_t next;
};
static int64_t roll(struct dice *d, int64_t from, int64_t to) {
    return from + (int64_t)random_below(&d->key, d->next++, (uint64_t)(to - from + 1));
}

struct random_rule {
    struct visible_rule rule;
    int32_t list[VISIBLE_MOST_PARTS][6];
    uint8_t blocks[64 * 64];
};

enum { MOST_ROWS = 80, MOST_KEYS = 200 };

static void draw_rule(struct random_rule *r, struct dice *d) {
    memset(r, 0, sizeof *r);
    r->rule.causal = roll(d, 0, 2) != 0;
    r->rule.parts = (int32_t)roll(d, 0, 3);
    for (int k = 0; k < r->rule.parts; k++) {
        struct visible_part *part = &r->rule.part[k];
        int64_t most = roll(d, 0, 2) == 0 ? 3 : roll(d, 0, 1) ? 20 : 150;
        part->kind = (enum visible_kind)roll(d, VISIBLE_WINDOW, VISIBLE_BLOCKS);
        part->a = roll(d, 1, most);
        part->b = roll(d, 1, most);
        if (part->kind == VISIBLE_FIXED)
            part->b = roll(d, 0, part->a);
        if (part->kind == VISIBLE_GLOBAL) {
            part->a = roll(d, 1, 6);
            for (int64_t g = 0, x = roll(d, 0, 30); g < part->a; g++, x += roll(d, 1, 50))
                r->list[k][g] = (int32_t)x;
            part->list = r->list[k];
        }
    }
    r->rule.block_q = roll(d, 2, 40);
    r->rule.block_k = roll(d, 4, 90);
    r->rule.block_rows = (MOST_ROWS + r->rule.block_q - 1) / r->rule.block_q;
    r->rule.block_columns = (MOST_KEYS + r->rule.block_k - 1) / r->rule.block_k;
    for (int64_t i = 0; i < r->rule.block_rows * r->rule.block_columns; i++)
        r->blocks[i] = roll(d, 0, 3) == 0;
    r->rule.blocks = r->blocks;
}

/* Everything about one rule, rows [0, rows) and keys [0, keys). */
static void check_rule(const struct random_rule *r, struct dice *d, int seed) {
    int64_t rows = roll(d, 1, MOST_ROWS), keys = roll(d, 1, MOST_KEYS), ahead = keys - rows;
    static bool sees[MOST_ROWS][MOST_KEYS];
    assert_int_equal(visible_check(&r->rule, rows, keys, "test", NULL), TRIL_OK);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < keys; j++)
            sees[i][j] = visible(&r->rule, i, i + ahead, j);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j0 = 0; j0 < keys; j0 += roll(d, 1, 70)) {
            int count = (int)(keys - j0 < 64 ? keys - j0 : roll(d, 1, 64));
            count = count > keys - j0 ? (int)(keys - j0) : count;
            uint64_t mask = visible_mask(&r->rule, i, i + ahead, j0, count);
            for (int b = 0; b < 64; b++)
                if ((mask >> b & 1) != (b < count && sees[i][j0 + b]))
                    fail_msg("seed %d: row %d, key %d: the mask says %d", seed, (int)i,
                             (int)(j0 + b), (int)(mask >> b & 1));
        }
    for (int n = 0; n < 60; n++) {
        int64_t i0 = roll(d, 0, rows - 1), i1 = roll(d, i0 + 1, rows);
        int64_t j0 = roll(d, 0, keys - 1), j1 = roll(d, j0 + 1, keys);
        bool any = false, all = true;
        for (int64_t i = i0; i < i1; i++)
            for (int64_t j = j0; j < j1; j++) {
                any |= sees[i][j];
                all &= sees[i][j];
            }
        bool may = visible_any(&r->rule, i0, i1, i0 + ahead, j0, j1);
        if (any && !may)
            fail_msg("seed %d: a row of %d..%d sees a key of %d..%d", seed, (int)i0, (int)i1,
                     (int)j0, (int)j1);
        bool blurred = false; /* by what the header says */
        for (int k = 0; k < r->rule.parts; k++)
            blurred |= r->rule.causal && (r->rule.part[k].kind == VISIBLE_FIXED ||
                                          r->rule.part[k].kind == VISIBLE_CHUNK ||
                                          r->rule.part[k].kind == VISIBLE_BLOCKS);
        if (may && !any && !blurred)
            fail_msg("seed %d: no row of %d..%d sees a key of %d..%d", seed, (int)i0, (int)i1,
                     (int)j0, (int)j1);
        if (!all && visible_all(&r->rule, i0, i1, i0 + ahead, j0, j1))
            fail_msg("seed %d: not all rows of %d..%d see keys %d..%d", seed, (int)i0, (int)i1,
                     (int)j0, (int)j1);
        /* monotone */
        int64_t wider = roll(d, j1, keys), taller = roll(d, i1, rows);
        int64_t lower = roll(d, 0, i0), left = roll(d, 0, j0);
        if (may)
            assert_true(visible_any(&r->rule, lower, taller, lower + ahead, left, wider));
    }
}

static void test_random_rules(void **state) {
    (void)state;
    for (int seed = 0; seed < 600; seed++) {
        struct dice d = {.key = {.seed = (uint64_t)seed, .op = RANDOM_TEST}};
        struct random_rule r;
        draw_rule(&r, &d);
        check_rule(&r, &d, seed);
    }
}

/* The definitions by hand, once each. */
static void test_definitions(void **state) {
    (void)state;
    static const struct {
        const char *text, *picture; /* of 6 rows and 6 keys */
    } cases[] = {
        {"causal", "x..... xx.... xxx... xxxx.. xxxxx. xxxxxx"},
        {"full", "xxxxxx xxxxxx xxxxxx xxxxxx xxxxxx xxxxxx"},
        {"window:2", "x..... xx.... .xx... ..xx.. ...xx. ....xx"},
        {"full+window:2", "xx.... xxx... .xxx.. ..xxx. ...xxx ....xx"},
        {"window:1+sinks:2", "x..... xx.... xxx... xx.x.. xx..x. xx...x"},
        {"global:2+window:1", "x..... .x.... xxx... ..xx.. ..x.x. ..x..x"},
        {"full+global:2", "..x... ..x... xxxxxx ..x... ..x... ..x..."},
        {"dilated:2,2", "x..... .x.... x.x... .x.x.. ..x.x. ...x.x"},
        {"strided:3", "x..... xx.... xxx... xxxx.. .xxxx. ..xxxx"},
        {"fixed:3,1", "x..... xx.... xxx... ..xx.. ..xxx. ..xxxx"},
        {"chunk:2", "x..... xx.... ..x... ..xx.. ....x. ....xx"},
        {"full+chunk:4", "xxxx.. xxxx.. xxxx.. xxxx.. ....xx ....xx"},
    };
    for (size_t n = 0; n < sizeof cases / sizeof *cases; n++) {
        struct visible_set set = {0};
        struct tril_error err = {0};
        if (visible_parse(cases[n].text, &set, &err) != TRIL_OK)
            fail_msg("%s: %s", cases[n].text, err.message);
        assert_int_equal(set.rule_count, 1);
        for (int i = 0; i < 6; i++)
            for (int j = 0; j < 6; j++)
                if (visible(&set.rules[0], i, i, j) != (cases[n].picture[i * 7 + j] == 'x'))
                    fail_msg("%s: row %d, key %d", cases[n].text, i, j);
        visible_set_free(&set);
    }
}

static void test_heads(void **state) {
    (void)state;
    struct visible_set set = {0};
    assert_int_equal(visible_parse("0-2=window:4 3=full+global:9,1,9,5", &set, NULL), TRIL_OK);
    assert_int_equal(visible_parse("4-5=blocks", &set, NULL), TRIL_OK);
    assert_int_equal(visible_set_heads(&set, 6, NULL), TRIL_OK);
    static const uint8_t expected[6] = {0, 0, 0, 1, 2, 2};
    assert_memory_equal(set.head_rule, expected, 6);
    assert_int_equal(set.rules[1].part[0].a, 3); /* sorted, each once */
    assert_int_equal(set.rules[1].part[0].list[0], 1);
    assert_int_equal(set.rules[1].part[0].list[2], 9);
    assert_true(visible_set_wants_blocks(&set));
    uint8_t blocks[2] = {1, 0};
    visible_set_blocks(&set, blocks, 1, 2, 8, 8);
    assert_true(visible(&set.rules[2], 3, 11, 7) && !visible(&set.rules[2], 3, 11, 8));
    struct tril_error err = {0};
    assert_int_equal(visible_set_heads(&set, 7, &err), TRIL_ERR_ARGUMENT); /* head 6 has none */
    assert_non_null(strstr(err.message, "head 6"));
    assert_int_equal(visible_set_heads(&set, 5, &err), TRIL_ERR_ARGUMENT); /* no head 5 */
    assert_int_equal(visible_parse("2=full", &set, NULL), TRIL_OK);
    assert_int_equal(visible_set_heads(&set, 6, &err), TRIL_ERR_ARGUMENT); /* head 2 has two */
    assert_non_null(strstr(err.message, "head 2"));
    visible_set_free(&set);
    assert_int_equal(visible_set_heads(&set, 3, NULL), TRIL_OK);
    assert_true(set.rules[0].causal && set.rules[0].parts == 0);
    visible_set_free(&set);
}

static void test_refusals(void **state) {
    (void)state;
    static const char *const texts[] = {"",
                                        "  ",
                                        "windows:3",
                                        "window",
                                        "window:",
                                        "window:0",
                                        "window:-1",
                                        "window:2147483648",
                                        "window:99999999999999999999",
                                        "window:3,4",
                                        "window:3x",
                                        "causal:1",
                                        "causal+full",
                                        "causal+causal",
                                        "full+",
                                        "+full",
                                        "window:3++sinks:1",
                                        "dilated:3",
                                        "dilated:3,0",
                                        "dilated:,3",
                                        "fixed:4,5",
                                        "global:",
                                        "global:1,",
                                        "global:1,,2",
                                        "global:a",
                                        "global:1,-2",
                                        "blocks:3",
                                        "0-=full",
                                        "3-1=full",
                                        "=full",
                                        "1-2full",
                                        "0-1=",
                                        ("sinks:1+sinks:1+sinks:1+sinks:1+sinks:1+sinks:1+sinks:1+"
                                         "sinks:1+sinks:1")};
    for (size_t n = 0; n < sizeof texts / sizeof *texts; n++) {
        struct visible_set set = {0};
        struct tril_error err = {0};
        if (visible_parse(texts[n], &set, &err) != TRIL_ERR_ARGUMENT || !err.message[0])
            fail_msg("\"%s\" was taken", texts[n]);
        visible_set_free(&set);
    }
    char many[VISIBLE_MOST_RULES * 5 + 10] = "";
    for (int k = 0; k <= VISIBLE_MOST_RULES; k++)
        strcat(many, "full ");
    struct visible_set set = {0};
    assert_int_equal(visible_parse(many, &set, NULL), TRIL_ERR_ARGUMENT);
    visible_set_free(&set);
    /* Text of noise: refused or taken, never more. */
    struct dice d = {.key = {.seed = 3, .op = RANDOM_TEST}};
    static const char letters[] = "0123,:+-= cwsgdfbaulndowiksxe";
    for (int n = 0; n < 20000; n++) {
        char text[40];
        int length = (int)roll(&d, 0, 30);
        for (int k = 0; k < length; k++)
            text[k] = letters[roll(&d, 0, (int64_t)sizeof letters - 2)];
        text[length] = 0;
        (void)visible_parse(text, &set, NULL);
        visible_set_free(&set);
    }
}

static void test_check(void **state) {
    (void)state;
    uint8_t blocks[6] = {0};
    struct visible_rule rule = {.parts = 1, .part = {{.kind = VISIBLE_BLOCKS}}};
    assert_int_equal(visible_check(&rule, 4, 4, "test", NULL), TRIL_ERR_ARGUMENT);
    rule.blocks = blocks;
    rule.block_rows = 2;
    rule.block_columns = 3;
    rule.block_q = 4;
    rule.block_k = 5;
    assert_int_equal(visible_check(&rule, 8, 15, "test", NULL), TRIL_OK);
    assert_int_equal(visible_check(&rule, 9, 15, "test", NULL), TRIL_ERR_ARGUMENT);
    assert_int_equal(visible_check(&rule, 8, 16, "test", NULL), TRIL_ERR_ARGUMENT);
    rule.block_q = 0;
    assert_int_equal(visible_check(&rule, 8, 15, "test", NULL), TRIL_ERR_ARGUMENT);
    static const int32_t descending[2] = {3, 2};
    rule.part[0] = (struct visible_part){VISIBLE_GLOBAL, 2, 0, descending};
    assert_int_equal(visible_check(&rule, 8, 15, "test", NULL), TRIL_ERR_ARGUMENT);
    rule.part[0] = (struct visible_part){(enum visible_kind)77, 2, 0, NULL};
    assert_int_equal(visible_check(&rule, 8, 15, "test", NULL), TRIL_ERR_ARGUMENT);
    rule.parts = VISIBLE_MOST_PARTS + 1;
    assert_int_equal(visible_check(&rule, 8, 15, "test", NULL), TRIL_ERR_ARGUMENT);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_random_rules), cmocka_unit_test(test_definitions),
        cmocka_unit_test(test_heads),        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_check),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
