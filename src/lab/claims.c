/* What is claimed of flash attention (memory, speed, fused over plain tiles, the block, the largest
 * batch), and the shares of a transformer's work and parameters. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/memory.h"
#include "base/progress.h"
#include "lab/layer.h"
#include "lab/lens.h"
#include "model/model.h"

/* ------------------------------------------------------------------ plain tiles */

/* The papers' plain block algorithm: tiles of 128 x 128 with a running maximum and sum, each line a
 * pass of its own over a tile in memory, hidden tiles computed and masked like the others. */
enum { TILE = 128 };

struct tiles {
    const struct attend *a;
    float *s;       /* [TILE, TILE] */
    float *m, *sum; /* [TILE] */
};

static void tile_scores(const struct tiles *x, const float *q, const float *k, int64_t i0,
                        int64_t j0) {
    int64_t row = x->a->row, d = x->a->d;
    for (int64_t i = 0; i < TILE; i++)
        for (int64_t j = 0; j < TILE; j++) {
            float dot = 0;
            for (int64_t c = 0; c < d; c++)
                dot += q[(i0 + i) * row + c] * k[(j0 + j) * row + c];
            x->s[i * TILE + j] = dot;
        }
    for (int64_t i = 0; i < TILE * TILE; i++)
        x->s[i] *= x->a->params.scale;
    for (int64_t i = 0; i < TILE; i++)
        for (int64_t j = 0; j < TILE; j++)
            if (j0 + j > i0 + i)
                x->s[i * TILE + j] = -INFINITY;
}

static void tile_update(const struct tiles *x, const float *v, float *o, int64_t i0, int64_t j0) {
    int64_t row = x->a->row, d = x->a->d, width = x->a->H * d;
    for (int64_t i = 0; i < TILE; i++) {
        float *s = x->s + i * TILE, *to = o + (i0 + i) * width, most = x->m[i], added = 0;
        for (int64_t j = 0; j < TILE; j++)
            most = s[j] > most ? s[j] : most;
        float old = x->m[i] == most ? 1 : expf(x->m[i] - most);
        for (int64_t j = 0; j < TILE; j++)
            s[j] = expf(s[j] - most);
        for (int64_t j = 0; j < TILE; j++)
            added += s[j];
        for (int64_t c = 0; c < d; c++)
            to[c] *= old;
        for (int64_t j = 0; j < TILE; j++)
            for (int64_t c = 0; c < d; c++)
                to[c] += s[j] * v[(j0 + j) * row + c];
        x->m[i] = most;
        x->sum[i] = x->sum[i] * old + added;
    }
}

static tril_status plain_tiles(void *arg, struct tril_error *err) {
    struct tiles *x = arg;
    const struct attend *a = x->a;
    int64_t width = a->H * a->d;
    (void)err;
    for (int64_t bh = 0; bh < a->B * a->H; bh++) {
        int64_t from = bh / a->H * a->T * a->row + bh % a->H * a->d;
        const float *q = (float *)a->q + from, *k = (float *)a->k + from, *v = (float *)a->v + from;
        float *o = (float *)a->o + bh / a->H * a->T * width + bh % a->H * a->d;
        for (int64_t i0 = 0; i0 < a->T; i0 += TILE) {
            for (int64_t i = 0; i < TILE; i++) {
                x->m[i] = -INFINITY;
                x->sum[i] = 0;
                memset(o + (i0 + i) * width, 0, (size_t)a->d * sizeof *o);
            }
            for (int64_t j0 = 0; j0 < a->T; j0 += TILE) {
                tile_scores(x, q, k, i0, j0);
                tile_update(x, v, o, i0, j0);
            }
            for (int64_t i = 0; i < TILE; i++)
                for (int64_t c = 0; c < a->d; c++)
                    o[(i0 + i) * width + c] /= x->sum[i];
        }
    }
    return TRIL_OK;
}

struct found {
    double memory, extra, forward, both, tiles, tiles_difference, block, batch[2];
};

static tril_status compare_tiles(struct lab *l, struct table *t, struct found *f,
                                 struct tril_error *err) {
    struct lab_timing how = {.warm = 2, .runs = 30, .seconds = (double)lab_choose(l, 1, 4)};
    struct attend a = {0};
    struct lab_times plain, fused;
    struct tiles x = {.a = &a, .s = malloc((TILE + 2) * TILE * sizeof *x.s)};
    float *kept = NULL;
    tril_status st = TRIL_OK;
    if (!x.s)
        return lab_no_memory(err);
    x.m = x.s + TILE * TILE;
    x.sum = x.m + TILE;
    TRY(attend_create(&a, l->ctx, 2, 512, 1, 256, DT_F32, false, 4, err));
    TRY(lab_time(&how, plain_tiles, &x, &plain, err));
    kept = a.o;
    a.o = NULL;
    TRY(mem_alloc(&a.o, 2 * 512 * 256 * sizeof *kept, "the output", err));
    TRY(lab_time(&how, attend_forward, &a, &fused, err));
    f->tiles = plain.median / fused.median;
    f->tiles_difference = lab_difference(kept, a.o, 2 * 512 * 256);
    table_add_text(t, "fused flash over plain tiles of 128 (B=2, T=512, D=256)");
    table_add_text(t, "5-10x");
    table_add_number(t, plain.median * 1e3, 2);
    table_add_number(t, fused.median * 1e3, 2);
    table_add_number(t, f->tiles, 1);
done:
    mem_free(kept);
    attend_free(&a);
    free(x.s);
    return st;
}

/* ------------------------------------------------------------------ standard and flash */

struct job {
    struct op_context *ctx;
    int64_t B, T, H;
    bool standard, backward;
};

static tril_status weigh(void *arg, struct tril_error *err) {
    const struct job *j = arg;
    struct op_context fresh = {0};
    struct attend a = {0};
    struct standard s = {0};
    tril_status st = TRIL_OK;
    TRY(op_context_init(&fresh, j->ctx->backend, err));
    TRY(attend_create(&a, &fresh, j->B, j->T, j->H, 64, DT_F32, j->backward, 1, err));
    if (j->standard) {
        TRY(standard_create(&s, &a, err));
        TRY(standard_forward(&s, err));
        if (j->backward)
            TRY(standard_backward(&s, err));
    } else {
        TRY(attend_forward(&a, err));
        if (j->backward)
            TRY(attend_backward(&a, err));
    }
done:
    standard_free(&s);
    attend_free(&a);
    op_context_free(&fresh);
    return st;
}

static tril_status compare_memory(struct lab *l, struct table *t, struct found *f,
                                  struct tril_error *err) {
    int64_t T = lab_choose(l, 1024, 4096), H = lab_choose(l, 8, 12);
    double bytes[2], tensors = (double)T * (double)H * 64 * 4 * 4;
    tril_status st = TRIL_OK;
    for (int standard = 0; standard < 2; standard++) {
        struct job j = {.ctx = l->ctx, .B = 1, .T = T, .H = H, .standard = standard};
        TRY(lab_peak_memory(l->ctx, weigh, &j, &bytes[standard], err));
    }
    f->memory = bytes[1] / bytes[0];
    f->extra = (bytes[1] - tensors) / fmax(bytes[0] - tensors, 1);
    table_add_text(t, "memory of the forward, MB (standard, flash)");
    table_add_text(t, "10-20x less");
    table_add_number(t, bytes[1] / 1e6, 1);
    table_add_number(t, bytes[0] / 1e6, 1);
    table_add_number(t, f->memory, 1);
    table_add_text(t, "the same beside q, k, v, o");
    table_add_text(t, "10-20x less");
    table_add_number(t, (bytes[1] - tensors) / 1e6, 1);
    table_add_number(t, fmax(bytes[0] - tensors, 0) / 1e6, 1);
    table_add_number(t, f->extra, 1);
done:
    return st;
}

static tril_status compare_speed(struct lab *l, struct table *t, struct found *f,
                                 struct tril_error *err) {
    int64_t T = lab_choose(l, 512, 2048), H = lab_choose(l, 4, 12), D = 64 * H;
    struct lab_timing how = {.warm = 2, .runs = 30, .seconds = (double)lab_choose(l, 1, 8)};
    struct attend a = {0};
    struct standard s = {0};
    struct layer x = {0};
    struct lab_times forward[2], backward[2], block[2];
    tril_status st = TRIL_OK;
    TRY(attend_create(&a, l->ctx, 1, T, H, 64, DT_F32, true, 1, err));
    TRY(standard_create(&s, &a, err));
    TRY(lab_time(&how, standard_forward, &s, &forward[0], err));
    TRY(lab_time(&how, standard_backward, &s, &backward[0], err));
    standard_free(&s);
    TRY(lab_time(&how, attend_forward, &a, &forward[1], err));
    TRY(lab_time(&how, attend_backward, &a, &backward[1], err));
    for (int flash = 0; flash < 2; flash++) {
        TRY(layer_create(&x, l->ctx, 1, T, D, H, DT_F32, flash ? LAYER_FLASH : LAYER_STANDARD, true,
                         err));
        TRY(lab_time(&how, layer_forward_once, &x, &block[flash], err));
        layer_free(&x);
    }
    double both[2] = {forward[0].median + backward[0].median,
                      forward[1].median + backward[1].median};
    f->forward = forward[0].median / forward[1].median;
    f->both = both[0] / both[1];
    f->block = block[0].median / block[1].median;
    const char *const names[] = {"attention forward, ms (standard, flash)",
                                 "attention forward and backward, ms", "a block forward, ms"};
    const char *const theirs[] = {"2-4x", "2-4x", "about 6x"};
    const double pairs[3][2] = {{forward[0].median, forward[1].median},
                                {both[0], both[1]},
                                {block[0].median, block[1].median}};
    for (int i = 0; i < 3; i++) {
        table_add_text(t, names[i]);
        table_add_text(t, theirs[i]);
        table_add_number(t, pairs[i][0] * 1e3, 2);
        table_add_number(t, pairs[i][1] * 1e3, 2);
        table_add_number(t, pairs[i][0] / pairs[i][1], 2);
    }
done:
    layer_free(&x);
    standard_free(&s);
    attend_free(&a);
    return st;
}

/* The largest batch whose measured peak (forward and backward) stays within a budget: doubled until
 * it does not. */
static tril_status largest_batch(struct lab *l, struct table *t, struct found *f,
                                 struct tril_error *err) {
    double budget = (double)lab_choose(l, 64, 1024) * 1e6;
    int64_t T = lab_choose(l, 512, 2048), H = lab_choose(l, 4, 12);
    tril_status st = TRIL_OK;
    for (int flash = 0; flash < 2; flash++) {
        f->batch[flash] = 0;
        for (int64_t B = 1; B <= 256; B *= 2) {
            struct job j = {
                .ctx = l->ctx, .B = B, .T = T, .H = H, .standard = !flash, .backward = true};
            double bytes;
            TRY(lab_peak_memory(l->ctx, weigh, &j, &bytes, err));
            if (bytes > budget)
                break;
            f->batch[flash] = (double)B;
        }
    }
    table_add_text(t, lab_choose(l, 0, 1) ? "largest batch in 1 GB (powers of two; T=2048)"
                                          : "largest batch in 64 MB (powers of two; T=512)");
    table_add_text(t, "larger");
    table_add_number(t, f->batch[0], 0);
    table_add_number(t, f->batch[1], 0);
    table_add_number(t, f->batch[0] > 0 ? f->batch[1] / f->batch[0] : NAN, 1);
done:
    return st;
}

/* ------------------------------------------------------------------ shares */

static const char *const share_names[] = {"attention projections", "attention scores", "MLP",
                                          "head"};

struct shares {
    double blocks, mlp_parameters, mlp_of_blocks, blocks_executed, head_flops, total_flops;
};

/* Counted by formula for GPT-2 (124M), and by a lens over a real forward pass. */
static tril_status measure_shares(struct lab *l, struct shares *s, struct tril_error *err) {
    static const char *const columns[] = {"part", "parameters", "share %", "forward FLOPs a token",
                                          "share % "};
    struct model_config c;
    struct model_options mo = {.dtype = DT_F32};
    struct model_counts n;
    struct lens lens;
    struct model *m = NULL;
    struct workspace *w = NULL;
    struct table *t = NULL;
    bool open = false;
    int64_t T = lab_choose(l, 128, 1024);
    int32_t *ids = calloc((size_t)T, sizeof *ids), offsets[2] = {0, (int32_t)T};
    struct workspace_options wo = {.max_tokens = T, .max_sequences = 1};
    double loss;
    int64_t count;
    tril_status st = TRIL_OK;
    if (!ids)
        return lab_no_memory(err);
    TRY(model_config_preset(&c, "gpt2", err));
    if (l->size == TRIL_LAB_QUICK) {
        c.layers = 2; /* the counts are those of 12; what is run is small */
    }
    TRY(lens_open(&lens, l->ctx, err));
    open = true;
    TRY(model_create(&m, &c, &mo, &lens.ctx, err));
    TRY(model_init(m, 1, err));
    TRY(workspace_create(&w, m, &wo, err));
    struct batch b = {.tokens = T, .sequences = 1, .ids = ids, .targets = ids, .offsets = offsets};
    lens_reset(&lens);
    TRY(model_loss(m, w, &b, &loss, &count, NULL, err));
    double linear = lens.flops[OP_LINEAR_FORWARD], scores = lens.flops[OP_ATTENTION_FORWARD];
    double head = 2.0 * (double)(c.vocab * c.dim * T);
    s->blocks_executed = (linear - head + scores) / (linear + scores);
    model_config_preset(&c, "gpt2", err);
    model_count(&c, T, &n);
    double head_flops = n.flops_head;
    s->total_flops = n.flops_attention + n.flops_scores + n.flops_ffn + head_flops;
    s->blocks = 1 - head_flops / s->total_flops;
    s->mlp_parameters = n.ffn / n.total;
    s->mlp_of_blocks = n.ffn / (n.ffn + n.attention);
    const double flops[] = {n.flops_attention, n.flops_scores, n.flops_ffn, head_flops};
    const double parameters[] = {n.attention, 0, n.ffn, n.embedding + n.position + n.norms};
    TRY(table_create(&t, columns, 5, err));
    for (int i = 0; i < 4; i++) {
        table_add_text(t, i == 3 ? "head (embeddings, norms)" : share_names[i]);
        table_add_number(t, parameters[i], 0);
        table_add_number(t, 100 * parameters[i] / n.total, 1);
        table_add_number(t, flops[i], 0);
        table_add_number(t, 100 * flops[i] / s->total_flops, 1);
    }
    st = lab_table(l, "shares", "GPT-2 (124M): where parameters and FLOPs are", t, err);
    t = NULL;
done:
    table_free(t);
    workspace_free(w);
    model_free(m);
    if (open)
        lens_close(&lens);
    free(ids);
    return st;
}

static tril_status run(struct lab *l, struct tril_error *err) {
    static const char *const columns[] = {"claim", "published", "standard", "flash", "times"};
    struct table *t = NULL;
    struct found f = {0};
    struct shares s = {0};
    struct progress progress;
    tril_status st = TRIL_OK;
    progress_start(&progress, "claims", 5);
    TRY(table_create(&t, columns, 5, err));
    TRY(compare_memory(l, t, &f, err));
    progress_update(&progress, 1, "memory");
    TRY(compare_speed(l, t, &f, err));
    progress_update(&progress, 2, "speed");
    TRY(compare_tiles(l, t, &f, err));
    progress_update(&progress, 3, "tiles");
    TRY(largest_batch(l, t, &f, err));
    progress_update(&progress, 4, "batch");
    st = lab_table(l, "claims", "Flash attention's claims", t, err);
    t = NULL;
    if (st != TRIL_OK)
        goto done;
    TRY(measure_shares(l, &s, err));
    double where[] = {1, 2, 3, 4, 5}, times[] = {f.memory, f.forward, f.both, f.tiles, f.block};
    const struct curve curves[] = {
        {.label = "here", .x = where, .y = times, .n = 5, .style = CURVE_DOTS}};
    const struct curve_plot plot = {
        .title = "Flash against what it replaces, times",
        .x_label = "1 memory, 2 forward, 3 forward and backward, 4 plain tiles, 5 the block",
        .y_label = "times",
        .curves = curves,
        .curve_count = 1,
        .y_log = true};
    TRY(lab_curves(l, "claims", &plot, err));
    lab_claim(l, f.extra >= 10, "flash needs less memory", "10-20x less",
              "%.1fx less, %.0fx beside q, k, v and o", f.memory, f.extra);
    lab_claim(l, f.forward >= 2, "flash is faster", "2-4x", "%.1fx forward, %.1fx with backward",
              f.forward, f.both);
    lab_claim(l, f.tiles >= 5, "fused over plain tiles", "5-10x", "%.0fx", f.tiles);
    lab_claim(l, f.block >= 4, "the block", "about 6x", "%.2fx", f.block);
    lab_claim(l, f.batch[1] > f.batch[0], "largest batch that fits", "larger", "%.0f against %.0f",
              f.batch[1], f.batch[0]);
    lab_claim(l, s.blocks > 0.7, "blocks of the FLOPs", "> 70%", "%.0f%%", 100 * s.blocks);
    lab_claim(l, fabs(s.mlp_parameters - 0.4) < 0.075, "MLP of the parameters", "about 40%",
              "%.1f%% of GPT-2 (124M), %.0f%% of its blocks", 100 * s.mlp_parameters,
              100 * s.mlp_of_blocks);
    lab_value(l, "memory_ratio", f.memory);
    lab_value(l, "extra_memory_ratio", f.extra);
    lab_value(l, "forward_speedup", f.forward);
    lab_value(l, "both_speedup", f.both);
    lab_value(l, "tiles_speedup", f.tiles);
    lab_value(l, "tiles_difference", f.tiles_difference);
    lab_value(l, "block_speedup", f.block);
    lab_value(l, "batch_standard", f.batch[0]);
    lab_value(l, "batch_flash", f.batch[1]);
    lab_value(l, "blocks_share", s.blocks);
    lab_value(l, "blocks_share_executed", s.blocks_executed);
    lab_value(l, "mlp_share", s.mlp_parameters);
    lab_say(l,
            "Flash against the textbook with its matrices in memory: %.1f times less memory in all "
            "(%.0f times beside the tensors that both need), %.1f times as fast forward, %.1f with "
            "the backward, %.2f for a whole block, whose matrix products are the same either way. "
            "The plain tiles of the papers, each line a pass of its own in plain C on one thread, "
            "take %.0f times as long as the fused kernel.",
            f.memory, f.extra, f.forward, f.both, f.block, f.tiles);
    lab_say(l,
            "Of GPT-2's forward FLOPs at T = %lld the blocks are %.0f%% (the head, with its 50257 "
            "rows, the rest); of its parameters the MLPs are %.1f%%, of the blocks' %.0f%%. A lens "
            "over a real pass of %s counted %.0f%%.",
            (long long)lab_choose(l, 128, 1024), 100 * s.blocks, 100 * s.mlp_parameters,
            100 * s.mlp_of_blocks, l->size == TRIL_LAB_QUICK ? "2 of the 12 layers" : "the model",
            100 * s.blocks_executed);
done:
    progress_end(&progress);
    table_free(t);
    return st;
}

const struct lab_experiment lab_claims = {{"claims",
                                           "flash's claims, and the shares of work and parameters",
                                           "E14, E15", 10, 90, false, false},
                                          "What is claimed of flash attention and of blocks",
                                          run};
