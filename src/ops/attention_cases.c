/* Attention's cases for the tests and the benchmarks of the registry. */
#include "ops/attention_cases.h"

#include <math.h>
#include <string.h>

#include "ops/reference.h"

/* Rules of the cases; per-head cases take several in turn. */
static const int32_t global_positions[] = {0, 5, 11};
static const uint8_t block_list[] = {1, 0, 1, 0, 1, 1, 0, 1, 0, 0, 0, 0, 1, 1, 1, 1, 0, 1, 0, 1};
static const struct visible_rule rules[] = {
    {.causal = true, .parts = 1, .part = {{VISIBLE_WINDOW, 5, 0, NULL}}},
    {.causal = false,
     .parts = 2,
     .part = {{VISIBLE_GLOBAL, 3, 0, global_positions}, {VISIBLE_DILATED, 3, 2, NULL}}},
    {.causal = true, .parts = 1, .part = {{VISIBLE_FIXED, 4, 1, NULL}}},
    {.causal = true,
     .parts = 2,
     .part = {{VISIBLE_STRIDED, 6, 0, NULL}, {VISIBLE_SINKS, 2, 0, NULL}}},
    {.causal = false,
     .parts = 1,
     .part = {{VISIBLE_BLOCKS, 0, 0, NULL}},
     .blocks = block_list,
     .block_rows = 5,
     .block_columns = 4,
     .block_q = 8,
     .block_k = 16},
    {.causal = true, .parts = 1, .part = {{VISIBLE_CHUNK, 16, 0, NULL}}},
    {.causal = true, .parts = 0},
};
enum { RULES = sizeof rules / sizeof *rules };
static const uint8_t head_rules[] = {0, 4, 2, 6, 1, 5, 3, 0};

/* N query rows in S sequences against M rows of keys; P > 0: paged. Sequence lengths are spread
 * unevenly by fill(). */
struct shape_case {
    const char *label;
    int n, m, h, k, d, s, p;
    bool causal, alibi;
    float softcap, dropout;
    enum dtype act;
    int rule;       /* 1 + an index of rules; -1: head_rules; 0: `causal` */
    int bias_heads; /* 0: none */
    bool sink, quantised;
};

static const struct shape_case forward_shapes[] = {
    {"causal", 33, 33, 4, 4, 16, 1, 0, true, false, 0, 0, DT_F32, 0, 0, 0, 0},
    {"causal bf16", 65, 65, 4, 2, 64, 2, 0, true, false, 0, 0, DT_BF16, 0, 0, 0, 0},
    {"full", 20, 47, 3, 1, 7, 1, 0, false, false, 0, 0, DT_F32, 0, 0, 0, 0},
    {"longer keys", 5, 130, 2, 2, 80, 1, 0, true, false, 0, 0, DT_F32, 0, 0, 0, 0},
    {"shorter keys", 40, 23, 2, 1, 33, 1, 0, true, false, 0, 0, DT_F32, 0, 0, 0, 0},
    {"packed", 100, 100, 2, 2, 32, 5, 0, true, true, 0, 0, DT_F32, 0, 0, 0, 0},
    {"paged", 6, 160, 4, 2, 128, 3, 10, true, false, 0, 0, DT_F32, 0, 0, 0, 0},
    {"softcap", 30, 30, 2, 2, 40, 1, 0, true, true, 1.5f, 0, DT_F32, 0, 0, 0, 0},
    {"dropout", 48, 48, 2, 1, 24, 2, 0, true, false, 0, 0.25f, DT_F32, 0, 0, 0, 0},
    {"one row", 1, 300, 6, 2, 64, 1, 0, true, false, 0, 0, DT_BF16, 0, 0, 0, 0},
    {"one channel", 9, 9, 1, 1, 1, 1, 0, true, false, 0, 0, DT_F32, 0, 0, 0, 0},
    {"wide", 70, 70, 1, 1, 256, 1, 0, true, false, 0, 0, DT_F32, 0, 0, 0, 0},
    {"window", 70, 70, 2, 1, 16, 2, 0, true, false, 0, 0, DT_F32, 1, 0, 0, 0},
    {"global", 30, 41, 2, 2, 12, 1, 0, true, true, 0, 0, DT_F32, 2, 1, 1, 0},
    {"fixed", 50, 50, 3, 3, 16, 1, 0, true, false, 0, 0.25f, DT_BF16, 3, 3, 0, 0},
    {"strided", 40, 90, 2, 1, 9, 2, 0, true, false, 2, 0, DT_F32, 4, 0, 1, 0},
    {"blocks", 40, 60, 2, 1, 16, 1, 0, true, false, 0, 0, DT_F32, 5, 2, 1, 0},
    {"rules by head", 40, 60, 8, 2, 16, 1, 0, true, true, 0, 0, DT_F32, -1, 8, 1, 0},
    {"paged window", 3, 160, 4, 2, 32, 3, 10, true, false, 0, 0, DT_F32, 4, 0, 1, 0},
    {"eight bits", 40, 70, 4, 2, 24, 2, 0, true, false, 0, 0, DT_F32, 0, 0, 0, 1},
    {"eight bits paged", 3, 160, 4, 2, 64, 3, 10, true, false, 0, 0, DT_BF16, 0, 0, 0, 1},
};
static const struct shape_case backward_shapes[] = {
    {"causal", 13, 13, 2, 2, 6, 1, 0, true, false, 0, 0, DT_F32, 0, 0, 0, 0},
    {"causal bf16", 65, 65, 4, 2, 64, 2, 0, true, false, 0, 0, DT_BF16, 0, 0, 0, 0},
    {"grouped", 12, 12, 4, 2, 5, 2, 0, true, true, 0, 0, DT_F32, 0, 0, 0, 0},
    {"full", 9, 17, 3, 1, 7, 1, 0, false, false, 0, 0, DT_F32, 0, 0, 0, 0},
    {"shorter keys", 12, 7, 2, 1, 3, 1, 0, true, false, 0, 0, DT_F32, 0, 0, 0, 0},
    {"softcap", 10, 10, 2, 2, 4, 1, 0, true, false, 1.5f, 0, DT_F32, 0, 0, 0, 0},
    {"dropout", 16, 16, 2, 1, 8, 2, 0, true, false, 0, 0.25f, DT_F32, 0, 0, 0, 0},
    {"packed", 100, 100, 2, 1, 32, 5, 0, true, false, 0, 0, DT_F32, 0, 0, 0, 0},
    {"wide", 40, 40, 1, 1, 256, 1, 0, true, false, 0, 0, DT_F32, 0, 0, 0, 0},
    {"window", 14, 14, 2, 1, 4, 2, 0, true, false, 0, 0, DT_F32, 1, 0, 0, 0},
    {"global", 9, 13, 2, 2, 3, 1, 0, true, true, 0, 0, DT_F32, 2, 1, 1, 0},
    {"fixed", 14, 14, 3, 3, 4, 1, 0, true, false, 0, 0.25f, DT_F32, 3, 3, 0, 0},
    {"strided", 9, 16, 2, 1, 5, 2, 0, true, false, 2, 0, DT_F32, 4, 1, 1, 0},
    {"blocks", 12, 20, 2, 1, 4, 1, 0, true, false, 0, 0, DT_F32, 5, 2, 1, 0},
    {"rules by head", 9, 11, 8, 2, 3, 1, 0, true, true, 0, 0, DT_F32, -1, 8, 1, 0},
    {"sink", 40, 40, 4, 2, 32, 1, 0, true, false, 0, 0, DT_BF16, 0, 1, 1, 0},
};

#define TEST_PAGE_SIZE 16

/* Where one operation has its optional arguments; -1: not at all. */
struct places {
    int pages, slopes, step, bias, sink, dbias, dsink, k_scale, v_scale;
};
static const struct places forward_places = {F_PAGES, F_SLOPES, F_STEP,    F_BIAS,   F_SINK,
                                             -1,      -1,       F_K_SCALE, F_V_SCALE};
static const struct places backward_places = {-1,      B_SLOPES, B_STEP, B_BIAS, B_SINK,
                                              B_DBIAS, B_DSINK,  -1,     -1};

static void leave_out(struct op_case *out, bool present, int place) {
    if (!present && place >= 0)
        out->absent |= 1u << place;
}

static void fill_case(const struct shape_case *s, struct op_case *out, const struct places *at) {
    *out = (struct op_case){.label = s->label, .act = s->act};
    out->size['N'] = s->n;
    out->size['M'] = s->m;
    out->size['H'] = s->h;
    out->size['K'] = s->k;
    out->size['d'] = s->d;
    out->size['S'] = s->s;
    out->size['P'] = s->p ? s->p : 1;
    out->size['G'] = s->bias_heads;
    out->size['A'] = s->n + 1;
    out->size['U'] = s->m + 3;
    struct attention_params p = {
        .scale = 1.0f / sqrtf((float)s->d),
        .softcap = s->softcap,
        .causal = s->causal,
        .page_size = s->p ? TEST_PAGE_SIZE : 0,
        .dropout = s->dropout,
        .key = {.seed = 7, .step = 3, .layer = 1, .op = RANDOM_DROPOUT_ATTENTION},
        .rules = s->rule > 0   ? &rules[s->rule - 1]
                 : s->rule < 0 ? rules
                               : NULL,
        .rule_count = s->rule > 0   ? 1
                      : s->rule < 0 ? RULES
                                    : 0,
        .head_rule = s->rule < 0 ? head_rules : NULL,
    };
    _Static_assert(sizeof p <= sizeof out->params, "parameters fit a test case");
    memcpy(out->params, &p, sizeof p);
    leave_out(out, s->p > 0, at->pages);
    leave_out(out, s->alibi, at->slopes);
    leave_out(out, s->dropout > 0, at->step);
    leave_out(out, s->bias_heads > 0, at->bias);
    leave_out(out, s->bias_heads > 0, at->dbias);
    leave_out(out, s->sink, at->sink);
    leave_out(out, s->sink, at->dsink);
    leave_out(out, s->quantised, at->k_scale);
    leave_out(out, s->quantised, at->v_scale);
    if (s->quantised)
        out->dtype[F_K] = out->dtype[F_V] = DT_I8 + 1;
    if (s->bias_heads > 1)
        out->strided |= 1u << at->bias;
}

bool attention_forward_case(int index, struct op_case *out) {
    if (index >= (int)(sizeof forward_shapes / sizeof forward_shapes[0]))
        return false;
    fill_case(&forward_shapes[index], out, &forward_places);
    return true;
}

bool attention_backward_case(int index, struct op_case *out) {
    if (index >= (int)(sizeof backward_shapes / sizeof backward_shapes[0]))
        return false;
    fill_case(&backward_shapes[index], out, &backward_places);
    return true;
}

/* Sequence s of S gets rows in proportion to s + 1, so that lengths differ and odd ones occur. */
static void spread(int32_t *offsets, int64_t sequences, int64_t total) {
    int64_t weight = sequences * (sequences + 1) / 2;
    for (int64_t s = 0; s <= sequences; s++)
        offsets[s] = (int32_t)(total * (s * (s + 1) / 2) / weight);
}

/* Some elements of -128 .. 127, and positive scales. */
static void fill_quantised(struct tensor *values, struct tensor *scale,
                           const struct random_key *key) {
    for (int64_t e = 0; e < tensor_count(values); e++)
        ((int8_t *)values->data)[e] = (int8_t)(random_u32(key, (uint64_t)e) >> 24);
    for (int64_t e = 0; e < tensor_count(scale); e++)
        ref_put(scale, e, (1 + (double)(random_u32(key, (uint64_t)e) % 64)) / 4096);
}

static void fill(const struct op_case *c, struct tensor *args, const struct random_key *key,
                 const struct places *at) {
    bool backward = at->pages < 0;
    int slopes = at->slopes, step = at->step;
    int64_t sequences = c->size['S'], keys = c->size['M'];
    int32_t *start = args[F_START].data, *length = args[F_LENGTH].data;
    spread(args[F_OFFSETS].data, sequences, c->size['N']);
    for (int64_t s = 0; s < sequences; s++) {
        int64_t a = keys * (s * (s + 1) / 2) / (sequences * (sequences + 1) / 2);
        int64_t b = keys * ((s + 1) * (s + 2) / 2) / (sequences * (sequences + 1) / 2);
        start[s] = (int32_t)a;
        length[s] = (int32_t)(b - a);
    }
    if (!backward && args[F_PAGES].data) { /* pages in reverse order, the last one not full */
        int64_t columns = c->size['P'], count = keys / TEST_PAGE_SIZE;
        int32_t *pages = args[F_PAGES].data;
        for (int64_t s = 0, next = 0; s < sequences; s++)
            for (int64_t i = 0; i < columns; i++, next++)
                pages[s * columns + i] = (int32_t)(count - 1 - next % count);
        for (int64_t s = 0; s < sequences; s++)
            if (length[s] > columns * TEST_PAGE_SIZE)
                length[s] = (int32_t)(columns * TEST_PAGE_SIZE);
    }
    if (args[slopes].data)
        for (int64_t h = 0; h < c->size['H']; h++)
            ref_put(&args[slopes], h, exp2(-8.0 * (double)(h + 1) / (double)c->size['H']));
    if (args[step].data)
        *(int64_t *)args[step].data = (int64_t)(random_u32(key, 0) % 1000);
}

void attention_forward_fill(const struct op_case *c, struct tensor *args,
                            const struct random_key *key) {
    fill(c, args, key, &forward_places);
    if (args[F_K].dtype == DT_I8) {
        fill_quantised(&args[F_K], &args[F_K_SCALE], key);
        fill_quantised(&args[F_V], &args[F_V_SCALE], key);
    }
}

void attention_backward_fill(const struct op_case *c, struct tensor *args,
                             const struct random_key *key) {
    fill(c, args, key, &backward_places);
}
