// ctest: timeout=120 levels
/* Trained models of others, from outside the project (../shared/data/models; skipped without): a
 * Llama that tells stories must continue one token for token, and a GPT-2 that sorts digits must
 * show the activations that were recorded of it. */
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "base/json.h"
#include "cpu/cpu.h"
#include "formats/safetensors.h"
#include "models.h"

static struct tril_error err;

#define STORIES TEST_SHARED_DIR "/models/stories260K"
#define SORT TEST_SHARED_DIR "/models/gpt-nano-sort"

/* Ten operations in a layer and two after; each adds a relative error of about sqrt(n) eps, n its
 * longest sum, to what is at most of the largest value's size; and their squares add. */
static double tolerance(const struct model_config *c, double largest) {
    double longest = (double)(c->ffn > c->dim ? c->ffn : c->dim);
    return sqrt((10.0 * (double)c->layers + 2) * longest) * FLT_EPSILON * largest;
}

struct subject {
    struct op_context ctx;
    struct model *m;
    struct workspace *w;
};

static void subject_open(struct subject *s, const char *dir, const struct backend *backend,
                         enum dtype t) {
    OK(op_context_init(&s->ctx, backend, &err));
    OK(model_load(&s->m, dir, &(struct model_options){.dtype = t, .training = false}, &s->ctx,
                  &err));
    const struct workspace_options o = {.max_tokens = 128, .max_sequences = 3};
    OK(workspace_create(&s->w, s->m, &o, &err));
}

static void subject_close(struct subject *s) {
    workspace_free(s->w);
    model_free(s->m);
    op_context_free(&s->ctx);
}

static int32_t best(const float *logits, int64_t V) {
    int32_t at = 0;
    for (int64_t v = 1; v < V; v++)
        if (logits[v] > logits[at])
            at = (int32_t)v;
    return at;
}

static void tell_story(const struct backend *backend, enum dtype t) {
    struct subject s;
    struct kv_cache *cache;
    json_t *expected;
    int32_t ids[128], targets[128];
    float logits[512];
    OK(json_read(&expected, STORIES "/expected.json", 1 << 20, &err));
    const json_t *list = json_object_get(expected, "ids");
    const json_t *last = json_object_get(expected, "last_logits");
    int32_t n = (int32_t)json_array_size(list), at = 0;
    int32_t prompt = (int32_t)json_array_size(json_object_get(expected, "prompt_ids"));
    for (int32_t i = 0; i < n; i++)
        ids[i] = (int32_t)json_integer_value(json_array_get(list, (size_t)i));
    for (int32_t i = 0; i < n; i++)
        targets[i] = i + 1 < n ? ids[i + 1] : -1;
    subject_open(&s, STORIES, backend, t);
    const int64_t V = s.m->config.vocab;
    assert_int_equal(V, 512);
    assert_int_equal(json_array_size(last), V);

    /* Token by token through the cache; bf16 may choose otherwise, so it is only led along. */
    OK(kv_cache_create(&cache, s.m, 1, 128, 0, t, &err));
    int differing = 0;
    while (at < n) {
        int32_t count = at ? 1 : prompt;
        const struct batch b = {.tokens = count,
                                .sequences = 1,
                                .ids = ids + at,
                                .offsets = (const int32_t[]){0, count},
                                .cache = cache,
                                .slots = (const int32_t[]){0},
                                .rows = (const int32_t[]){count - 1},
                                .row_count = 1};
        OK(model_forward(s.m, s.w, &b, logits, &err));
        at += count;
        if (at < n)
            differing += best(logits, V) != ids[at];
    }
    double largest = 0, error = 0;
    for (int64_t v = 0; v < V; v++) {
        double due = json_number_value(json_array_get(last, (size_t)v));
        largest = fmax(largest, fabs(due));
        error = fmax(error, fabs(logits[v] - due));
    }
    /* bf16: 2^-9 in place of 2^-23 sqrt(n), and the sums in fp32. */
    double allowed = t == DT_F32 ? tolerance(&s.m->config, largest) : sqrt(52) * 0x1p-9 * largest;
    const struct batch whole = {.tokens = n,
                                .sequences = 1,
                                .ids = ids,
                                .offsets = (const int32_t[]){0, n},
                                .targets = targets};
    double loss, due = json_number_value(json_object_get(expected, "mean_next_token_loss"));
    int64_t counted;
    OK(model_loss(s.m, s.w, &whole, &loss, &counted, NULL, &err));
    assert_int_equal(counted, n - 1);
    print_message("stories260K %-9s %s: logits within %.1e (%.1e allowed), loss %.6f (%.6f due), "
                  "%d tokens differ\n",
                  backend->name, dtype_name(t), error, allowed, loss / (n - 1), due, differing);
    assert_true(error <= allowed);
    assert_true(fabs(loss / (n - 1) - due) <= allowed);
    assert_true(t == DT_F32 ? differing == 0 : differing <= n / 10);
    kv_cache_free(cache);
    subject_close(&s);
    json_decref(expected);
}

static void test_stories(void **state) {
    (void)state;
    if (!path_exists(STORIES "/expected.json")) {
        print_message("skipped: no " STORIES "\n");
        skip();
    }
    tell_story(backend_reference(), DT_F32);
    tell_story(backend_cpu(), DT_F32);
    tell_story(backend_cpu(), DT_BF16);
}

/* The mean loss of the story's tokens, each from keys and values that lie in a cache. */
static double cached_loss(struct subject *s, enum dtype t, const int32_t *ids, int32_t n) {
    struct kv_cache *cache;
    const int64_t V = s->m->config.vocab;
    float *logits = malloc((size_t)(n * V) * sizeof *logits);
    double loss = 0;
    assert_non_null(logits);
    OK(kv_cache_create(&cache, s->m, 1, 128, 0, t, &err));
    const struct batch b = {.tokens = n,
                            .sequences = 1,
                            .ids = ids,
                            .offsets = (const int32_t[]){0, n},
                            .cache = cache,
                            .slots = (const int32_t[]){0}};
    OK(model_forward(s->m, s->w, &b, logits, &err));
    for (int32_t i = 0; i + 1 < n; i++) {
        const float *row = logits + i * V;
        double largest = (double)row[best(row, V)], sum = 0;
        for (int64_t v = 0; v < V; v++)
            sum += exp((double)row[v] - largest);
        loss += log(sum) + largest - (double)row[ids[i + 1]];
    }
    kv_cache_free(cache);
    free(logits);
    return loss / (n - 1);
}

/* Keys and values of 8 bits: each is off by half a step of 1 / 127 of its head's largest at most,
 * 0.4%, which tells in the loss about as bf16's 0.2% (half of 2^-8) do; a hundredth is much. */
static void test_cache_dtypes(void **state) {
    (void)state;
    struct subject s;
    json_t *expected;
    int32_t ids[128];
    if (!path_exists(STORIES "/expected.json")) {
        print_message("skipped: no " STORIES "\n");
        skip();
    }
    OK(json_read(&expected, STORIES "/expected.json", 1 << 20, &err));
    const json_t *list = json_object_get(expected, "ids");
    int32_t n = (int32_t)json_array_size(list);
    for (int32_t i = 0; i < n; i++)
        ids[i] = (int32_t)json_integer_value(json_array_get(list, (size_t)i));
    subject_open(&s, STORIES, backend_cpu(), DT_F32);
    double whole = cached_loss(&s, DT_F32, ids, n), half = cached_loss(&s, DT_BF16, ids, n),
           eight = cached_loss(&s, DT_I8, ids, n);
    print_message("stories260K, cache of fp32, bf16, 8 bits: perplexity %.4f, %.4f, %.4f\n",
                  exp(whole), exp(half), exp(eight));
    assert_true(eight != whole && fabs(eight - whole) < 0.01 && fabs(half - whole) < 0.01);
    subject_close(&s);
    json_decref(expected);
}

/* Compares what the hook sees with what was recorded. */
struct watch {
    const struct safetensors *recorded;
    const struct model_config *c;
    int seen;
    double worst;
};

/* Heads in the record are [B, H, T, d]; here tensors are [B * T, H, d]. */
static void compare(struct watch *w, const char *name, const struct tensor *t, bool heads) {
    const struct st_tensor *due = safetensors_find(w->recorded, name);
    assert_non_null(due);
    const float *values = due->data;
    double largest = 0, error = 0;
    const int64_t T = 11, H = w->c->heads, d = w->c->head_dim;
    int64_t count = (int64_t)(due->bytes / sizeof(float)), columns = count / 33;
    for (int64_t i = 0; i < count; i++) {
        int64_t n = i / columns, k = i % columns, at = i;
        if (heads)
            at = ((n / T * H + k / d) * T + n % T) * d + k % d;
        const float *row = (const float *)t->data + n * t->stride[0];
        float value = t->rank == 3 ? row[k / d * t->stride[1] + k % d] : row[k];
        largest = fmax(largest, fabs((double)values[at]));
        error = fmax(error, fabs((double)value - (double)values[at]));
    }
    double ratio = error / tolerance(w->c, largest);
    if (!(ratio <= 1))
        fail_msg("%s is off by %g of %g", name, error, largest);
    w->worst = fmax(w->worst, ratio);
    w->seen++;
}

static void watch_hook(void *arg, int layer, const char *name, const struct tensor *t) {
    static const struct {
        int layer;
        const char *name, *recorded;
        bool heads;
    } points[] = {
        {-1, "x", "x", false},
        {0, "norm 1", "ln1", false},
        {0, "attention / qkv", "qkv", false},
        {0, "attention / q", "q", true},
        {0, "attention / k", "k", true},
        {0, "attention / v", "v", true},
        {0, "attention / heads", "y", false},
        {0, "x after attention", "attnResid", false},
        {0, "norm 2", "ln2", false},
        {0, "ffn / up", "fc", false},
        {0, "ffn / hidden", "gelu", false},
        {0, "x after ffn", "mlpResid", false},
        {1, "x after ffn", "block1", false},
        {2, "x after ffn", "block2", false},
        {-1, "head input", "ln_f", false},
        {-1, "logits", "lm_head", false},
    };
    for (size_t i = 0; i < sizeof points / sizeof *points; i++)
        if (points[i].layer == layer && strcmp(points[i].name, name) == 0)
            compare(arg, points[i].recorded, t, points[i].heads);
}

static void sort_digits(const struct backend *backend) {
    struct subject s;
    struct safetensors *recorded;
    int32_t ids[33];
    float logits[33 * 3];
    OK(safetensors_open(&recorded, SORT "/activations.safetensors", &err));
    const float *idx = safetensors_find(recorded, "idx")->data;
    for (int i = 0; i < 33; i++)
        ids[i] = (int32_t)idx[i];
    subject_open(&s, SORT, backend, DT_F32);
    struct watch w = {recorded, &s.m->config, 0, 0};
    workspace_set_hook(s.w, watch_hook, &w);
    const struct batch b = {
        .tokens = 33, .sequences = 3, .ids = ids, .offsets = (const int32_t[]){0, 11, 22, 33}};
    OK(model_forward(s.m, s.w, &b, logits, &err));
    print_message("gpt-nano-sort %-9s: %d tensors, %.2f of what is allowed\n", backend->name,
                  w.seen, w.worst);
    assert_true(w.seen >= 15); /* inference may fuse the FFN's first matrix and its activation */
    workspace_set_hook(s.w, NULL, NULL);

    /* And it sorts: six digits in, the same six in order out. */
    for (int k = 0; k < 3; k++) {
        int32_t digits[12], sorted[6], found = 0;
        for (int i = 0; i < 6; i++)
            digits[i] = ids[k * 11 + i];
        for (int32_t v = 0; v < 3; v++)
            for (int i = 0; i < 6; i++)
                if (digits[i] == v)
                    sorted[found++] = v;
        for (int32_t n = 6; n < 12; n++) {
            const struct batch more = {.tokens = n,
                                       .sequences = 1,
                                       .ids = digits,
                                       .offsets = (const int32_t[]){0, n},
                                       .rows = (const int32_t[]){n - 1},
                                       .row_count = 1};
            OK(model_forward(s.m, s.w, &more, logits, &err));
            digits[n] = best(logits, 3);
            assert_int_equal(digits[n], sorted[n - 6]);
        }
    }
    subject_close(&s);
    safetensors_close(recorded);
}

static void test_sort(void **state) {
    (void)state;
    if (!path_exists(SORT "/activations.safetensors")) {
        print_message("skipped: no " SORT "\n");
        skip();
    }
    sort_digits(backend_reference());
    sort_digits(backend_cpu());
}

int main(void) {
    if (level_missing())
        return TEST_SKIP;
    if (!path_exists(STORIES) && !path_exists(SORT)) {
        print_message("no " TEST_SHARED_DIR "/models\n");
        return TEST_SKIP;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_stories),
        cmocka_unit_test(test_cache_dtypes),
        cmocka_unit_test(test_sort),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
