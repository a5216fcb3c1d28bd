/* Training a hundred million parameters (GPT-2's blocks) the plain way (fp32, materialised
 * attention, every operation by itself, nothing recomputed), and with one saving after the other:
 * memory and speed. */
#include <math.h>
#include <stdlib.h>

#include "base/progress.h"
#include "base/system.h"
#include "lab/bench.h"
#include "lab/learner.h"
#include "lab/lens.h"
#include "train/optimiser.h"

enum { WAYS = 5 };

struct way {
    const char *name, *memory, *speed; /* published */
    bool materialised, unfused, half;
    enum recompute recompute;
    double ms, bytes, activations, loss; /* bytes: the most; loss: of the last step */
};

struct job {
    struct lab *l;
    const struct model_config *c;
    int64_t batch, seq, steps;
    struct way *way;
};

static tril_status train(void *arg, struct tril_error *err) {
    struct job *j = arg;
    struct way *w = j->way;
    const int64_t n = j->batch * j->seq;
    struct model_options mo = {.dtype = w->half ? DT_BF16 : DT_F32, .training = true};
    struct workspace_options wo = {
        .max_tokens = n, .max_sequences = j->batch, .backward = true, .recompute = w->recompute};
    struct adamw_params adamw = {0.9f, 0.95f, 1e-8f, 0.1f};
    struct train_call call = {.scale = 1.0f / (float)n, .overwrite = true};
    struct random_key key = {.seed = 5, .op = RANDOM_TEST};
    struct optimiser optimiser = {0};
    struct workspace *space = NULL;
    struct model *m = NULL;
    struct lens lens;
    bool open = false, applied;
    double *seconds = malloc((size_t)j->steps * sizeof *seconds), norm, loss;
    int32_t *ids = malloc((size_t)(n + j->batch + 2) * sizeof *ids), *offsets = ids + n + 1;
    int64_t count;
    tril_status st = TRIL_OK;
    if (!ids || !seconds) {
        st = lab_no_memory(err);
        goto done;
    }
    for (int64_t i = 0; i <= n; i++)
        ids[i] = (int32_t)random_below(&key, (uint64_t)i, (uint64_t)j->c->vocab);
    for (int64_t b = 0; b <= j->batch; b++)
        offsets[b] = (int32_t)(b * j->seq);
    TRY(lens_open(&lens, j->l->ctx, err));
    open = true;
    lens.other = w->materialised;
    lens.implementation = ATTENTION_MATERIALISED;
    lens.unfused = w->unfused;
    TRY(model_create(&m, j->c, &mo, &lens.ctx, err));
    TRY(model_init(m, 1, err));
    TRY(workspace_create(&space, m, &wo, err));
    TRY(optimiser_create(&optimiser, m, &adamw, 1.0f, err));
    struct batch b = {
        .tokens = n, .sequences = j->batch, .ids = ids, .targets = ids + 1, .offsets = offsets};
    for (int64_t step = -1; step < j->steps; step++) { /* one to warm up */
        double begun = clock_seconds();
        TRY(model_forward_backward(m, space, &b, &call, &loss, &count, err));
        TRY(optimiser_step(&optimiser, step + 2, 1e-4, &norm, &applied, err));
        if (step >= 0)
            seconds[step] = clock_seconds() - begun;
    }
    w->ms = bench_median(seconds, j->steps) * 1e3;
    w->loss = loss / (double)count;
    w->activations = (double)workspace_bytes(space);
done:
    optimiser_free(&optimiser);
    workspace_free(space);
    model_free(m);
    if (open)
        lens_close(&lens);
    free(seconds);
    free(ids);
    return st;
}

static tril_status run(struct lab *l, struct tril_error *err) {
    static const char *const columns[] = {"training", "published GB",   "published speed",
                                          "peak MB",  "activations MB", "ms a step",
                                          "tokens/s", "speed",          "loss"};
    struct way w[WAYS] = {
        {"fp32, materialised, unfused", "32", "1x", true, true, false, RECOMPUTE_NONE, 0, 0, 0, 0},
        {"with flash attention", NULL, NULL, false, true, false, RECOMPUTE_NONE, 0, 0, 0, 0},
        {"and fused products", NULL, NULL, false, false, false, RECOMPUTE_NONE, 0, 0, 0, 0},
        {"and bf16", NULL, NULL, false, false, true, RECOMPUTE_NONE, 0, 0, 0, 0},
        {"and recomputation (full)", "18", "2.3x", false, false, true, RECOMPUTE_FULL, 0, 0, 0, 0},
    };
    bool quick = l->size == TRIL_LAB_QUICK;
    struct model_config c = learner_config(true, quick ? 3 : 12, quick ? 64 : 768, quick ? 4 : 12,
                                           quick ? 256 : 16384, quick ? 256 : 1024);
    struct job j = {.l = l,
                    .c = &c,
                    .batch = quick       ? 2
                             : l->device ? 16
                                         : 1,
                    .seq = quick       ? 256
                           : l->device ? 1024
                                       : 512,
                    .steps = lab_choose(l, 3, l->device ? 10 : 2)};
    struct table *t = NULL;
    struct progress progress;
    struct model_counts counts;
    double speed[WAYS], off = 0;
    const char *labels[WAYS];
    char title[160];
    tril_status st = TRIL_OK;
    progress_start(&progress, "training", WAYS);
    TRY(table_create(&t, columns, 9, err));
    for (int i = 0; i < WAYS; i++) {
        j.way = &w[i];
        TRY(lab_peak_memory(l->ctx, train, &j, &w[i].bytes, err));
        speed[i] = w[0].ms / w[i].ms;
        labels[i] = w[i].name;
        off = i < 3 ? fmax(off, fabs(w[i].loss - w[0].loss)) : off;
        table_add_text(t, w[i].name);
        table_add_text(t, w[i].memory);
        table_add_text(t, w[i].speed);
        table_add_number(t, w[i].bytes / 1e6, 1);
        table_add_number(t, w[i].activations / 1e6, 1);
        table_add_number(t, w[i].ms, 1);
        table_add_number(t, (double)(j.batch * j.seq) / w[i].ms * 1e3, 0);
        table_add_number(t, speed[i], 2);
        table_add_number(t, w[i].loss, 4);
        progress_update(&progress, i + 1, w[i].name);
    }
    model_count(&c, j.seq, &counts);
    snprintf(title, sizeof title,
             "%.1f million parameters, %lld x %lld tokens a step, AdamW; the memory of all of it",
             counts.total / 1e6, (long long)j.batch, (long long)j.seq);
    st = lab_table(l, "training", title, t, err);
    t = NULL;
    if (st != TRIL_OK)
        goto done;
    const struct bar_plot plot = {.title = "Speed of training",
                                  .subtitle = "beside the plain way",
                                  .names = labels,
                                  .values = speed,
                                  .count = WAYS,
                                  .decimals = 2,
                                  .marked = 0};
    TRY(lab_bars(l, "speed", &plot, err));
    const struct way *last = &w[WAYS - 1];
    double saved = 1 - last->bytes / w[0].bytes, held = 1 - last->activations / w[0].activations;
    double fastest = 0;
    for (int i = 0; i < WAYS; i++)
        fastest = fmax(fastest, speed[i]);
    lab_claim(l, saved >= 1 - 18.0 / 32, "optimised: memory", "32 GB to 18 GB: -44%",
              "%.0f MB to %.0f MB: %+.0f%%", w[0].bytes / 1e6, last->bytes / 1e6, -100 * saved);
    lab_claim(l, speed[WAYS - 1] >= 2.3, "optimised: speed", "2.3x",
              "%.2fx; without recomputation %.2fx", speed[WAYS - 1], speed[WAYS - 2]);
    lab_value(l, "memory_saved", saved);
    lab_value(l, "activations_saved", held);
    lab_value(l, "speed", speed[WAYS - 1]);
    lab_value(l, "fastest", fastest);
    lab_value(l, "loss_difference", off);
    lab_value(l, "loss_bf16_difference", fabs(last->loss - w[0].loss));
    lab_value(l, "parameters", counts.total);
    lab_say(l,
            "All of it takes %.0f MB the plain way and %.0f MB optimised; of these the activations "
            "%.0f "
            "and %.0f MB. Weights, gradients and the optimiser's two moments in fp32 are %.0f MB "
            "whatever is done, which is why small batches save less than the published figures.",
            w[0].bytes / 1e6, last->bytes / 1e6, w[0].activations / 1e6, last->activations / 1e6,
            16 * counts.total / 1e6);
    lab_say(
        l,
        "A step takes %.1f ms the plain way, %.1f with flash attention, %.1f with activations and "
        "residuals inside the products, %.1f in bf16, and %.1f with everything recomputed. %s The "
        "losses of the fp32 ways differ by %.1e.",
        w[0].ms, w[1].ms, w[2].ms, w[3].ms, w[4].ms,
        l->device
            ? "The materialised matrices are those of one layer at a time: the backward makes "
              "them again."
            : "The materialised matrices are those of one head at a time, and the backward "
              "makes them again: less memory than a framework keeps.",
        off);
done:
    progress_end(&progress);
    table_free(t);
    return st;
}

const struct lab_experiment lab_training = {
    {"training", "100M parameters trained the plain way, and with one saving after another",
     "E9, E10", 5, 120, false, true},
    "Training, plain and optimised",
    run};
