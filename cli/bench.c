/* tril bench: how fast this machine trains and runs a model, against its own limits. */
#include <stdio.h>
#include <string.h>

#include "bench_attention.h"
#include "cli.h"
#include "json.h"
#include "model_options.h"
#include "options.h"
#include "tril/tril.h"

static json_t *products_json(const struct tril_bench_result *r) {
    json_t *list = json_array();
    for (int i = 0; i < r->product_count; i++) {
        const struct tril_bench_product *p = &r->products[i];
        json_array_append_new(list,
                              json_pack("{s:s, s:I, s:I, s:I, s:f, s:f, s:f}", "name", p->name, "n",
                                        (json_int_t)p->n, "outputs", (json_int_t)p->o, "inputs",
                                        (json_int_t)p->i, "seconds", p->seconds, "flops_per_s",
                                        p->flops_per_s, "fraction", p->fraction));
    }
    return list;
}

static void print_json(const struct tril_bench_options *o, const struct tril_bench_result *r) {
    struct tril_build_info info;
    tril_build_info_get(&info);
    json_t *root =
        json_pack("{s:s, s:s, s:I, s:I, s:I, s:f, s:f, s:f, s:s, s:i, s:s}", "what", o->what,
                  "dtype", o->dtype, "batch", (json_int_t)r->batch, "seq", (json_int_t)r->seq,
                  "steps", (json_int_t)r->steps, "peak_flops", r->peak_flops,
                  "bandwidth_bytes_per_s", r->bandwidth, "peak_rss_bytes", r->peak_rss_bytes, "isa",
                  r->isa, "threads", r->threads, "processor", info.processor);
    const bool decode = strcmp(o->what, "decode") == 0;
    if (r->product_count) {
        json_object_set_new(root, "products", products_json(r));
        json_object_set_new(root, "tokens_per_s", json_null());
        json_object_set_new(root, "mfu", json_null()); /* each product has its fraction */
        json_object_set_new(root, "bandwidth_fraction", json_null());
    } else {
        json_object_set_new(root, "tokens_per_s", json_real(r->tokens_per_s));
        json_object_set_new(root, "step_ms", json_real(r->step_ms));
        json_object_set_new(root, "step_ms_min", json_real(r->step_ms_min));
        json_object_set_new(root, "step_ms_max", json_real(r->step_ms_max));
        json_object_set_new(root, "mfu", json_real(r->mfu));
        json_object_set_new(root, "bandwidth_fraction",
                            decode ? json_real(r->bandwidth_fraction) : json_null());
        json_object_set_new(root, "anonymous_bytes", json_real(r->anonymous_bytes));
        json_object_set_new(root, "parameters", json_real(r->parameters));
        if (decode)
            json_object_set_new(root, "kv_dtype",
                                json_string(o->kv_dtype ? o->kv_dtype : o->dtype));
    }
    json_print(root);
}

static void print_text(const struct tril_bench_options *o, const struct tril_bench_result *r) {
    printf("peak %.3f TFLOP/s (%s), memory %.1f GB/s, %s, %d threads\n", r->peak_flops / 1e12,
           o->dtype, r->bandwidth / 1e9, r->isa, r->threads);
    for (int i = 0; i < r->product_count; i++) {
        const struct tril_bench_product *p = &r->products[i];
        printf("  %-24s %6lld x %6lld x %6lld  %8.2f ms  %7.1f GFLOP/s  %3.0f%%\n", p->name,
               (long long)p->n, (long long)p->o, (long long)p->i, p->seconds * 1e3,
               p->flops_per_s / 1e9, 100 * p->fraction);
    }
    if (r->product_count)
        return;
    printf("%s: %.1f tokens/s (median step %.1f ms, %.1f to %.1f), ", o->what, r->tokens_per_s,
           r->step_ms, r->step_ms_min, r->step_ms_max);
    if (strcmp(o->what, "decode") == 0)
        printf("%.0f%% of the memory bandwidth", 100 * r->bandwidth_fraction);
    else
        printf("MFU %.1f%%", 100 * r->mfu);
    printf(", peak memory %.2f GB\n", r->peak_rss_bytes / 1e9);
}

int cmd_bench(int argc, char **argv) {
    struct tril_bench_options o = {.source = {.overrides = tril_model_overrides_none()},
                                   .batch = 1,
                                   .steps = 5,
                                   .dtype = "bf16",
                                   .recompute = "none",
                                   .device = "cpu"};
    struct model_flags flags = {0};
    struct option_list what = {0}, visible = {0};
    struct tril_bench_attention_options a = {0};
    struct tril_bench_result result;
    struct tril_error err = {0};
    const char *block = NULL;
    bool json = false;
    int64_t threads = 0;
    int code = 0;
    const struct option options[] = {
        {"model", "DIR", "the shape of this model", OPTION_STRING, &o.source.model, 0, 0, NULL},
        {"preset", "NAME", "the shape of a preset (default: gpt2)", OPTION_STRING, &o.source.preset,
         0, 0, NULL},
        {"config", "FILE", "the shape in a config.json", OPTION_STRING, &o.source.config, 0, 0,
         NULL},
        MODEL_OPTIONS(o.source.overrides, flags),
        {"vocab", "V", "tokens", OPTION_INT, &o.source.overrides.vocab, 1, 1e8, NULL},
        {.kind = OPTION_HEADING, .help = "What is timed"},
        {"batch", "B", "rows (1)", OPTION_INT, &o.batch, 1, 1e6, NULL},
        {"seq", "T", "tokens a row; decode: tokens in the cache (512)", OPTION_INT, &o.seq, 1, 1e8,
         NULL},
        {"steps", "N", "repetitions, after a warm-up (5)", OPTION_INT, &o.steps, 1, 1e6, NULL},
        {"dtype", "TYPE", "weights and activations", OPTION_CHOICE, &o.dtype, 0, 0,
         "bf16|fp32|fp16|tf32"},
        {"recompute", "WHAT", "train: activations computed again", OPTION_CHOICE, &o.recompute, 0,
         0, "none|selective|full"},
        {"kv-dtype", "TYPE", "decode: of the cache (--dtype)", OPTION_CHOICE, &o.kv_dtype, 0, 0,
         "fp32|bf16|q8"},
        DEVICE_OPTION(&o.device),
        {.kind = OPTION_HEADING,
         .help = "Attention (with --batch, --heads, --kv-heads, --seq, --head-dim, --dropout)"},
        {"impl", "NAME", "which of the ways to compute it (flash)", OPTION_CHOICE,
         &a.implementation, 0, 0, "flash|fused|materialised|reference|linear"},
        {"visible", "RULE", "see tril attention --help (causal)", OPTION_REPEATED, &visible, 0, 0,
         NULL},
        {"block", "Q,K",
         "rows and keys of flash's forward tiles on the CPU, as near as they can be (chosen)",
         OPTION_STRING, &block, 0, 0, NULL},
        {"keys", "Tk", "(--seq)", OPTION_INT, &a.keys, 1, 1e9, NULL},
        {"alibi", NULL, "ALiBi's slopes", OPTION_FLAG, &a.alibi, 0, 0, NULL},
        {"softcap", "X", "c tanh(score / c); 0: none", OPTION_NUMBER, &a.softcap, 0, 1e30, NULL},
        {"forward-only", NULL, "do not time the backward", OPTION_FLAG, &a.forward_only, 0, 0,
         NULL},
        {"decode", NULL, "one new token against a cache in memory, not in the processor",
         OPTION_FLAG, &a.decode, 0, 0, NULL},
        {"cache", "N", "keys in the cache (8192)", OPTION_INT, &a.cache, 1, 1e9, NULL},
        {"page", "P", "rows of a page (default: contiguous)", OPTION_INT, &a.page, 1, 65536, NULL},
        {.kind = OPTION_HEADING, .help = "How"},
        {"threads", "N", "0: all processors", OPTION_INT, &threads, 0, 1024, NULL},
        {"json", NULL, "print one JSON object", OPTION_FLAG, &json, 0, 0, NULL},
    };
    const struct command command = {
        .name = "bench",
        .usage =
            "train|prefill|decode|gemm|attention [--preset NAME] [--batch B] [--seq T] [--json]",
        .summary =
            "Times whole training steps, prefill, decoding, single matrix products or attention by "
            "itself on\nrandom weights, and measures the machine's peak rate and memory bandwidth "
            "in the same run.",
        .examples =
            "  tril bench train --preset gpt2 --batch 4 --seq 256\n"
            "  tril bench decode --preset llama-110m --dtype bf16 --steps 50 --json\n"
            "  TRIL_CPU=avx2 tril bench gemm --preset gpt2 --batch 4 --seq 256 --dtype fp32\n"
            "  tril bench attention --heads 12 --seq 4096 --head-dim 64 --visible window:256\n"
            "  tril bench attention --decode --heads 32 --kv-heads 8 --head-dim 128 --cache 8192\n"
            "  tril bench attention --device cuda --heads 16 --seq 8192 --head-dim 128",
        .options = options,
        .option_count = sizeof options / sizeof *options,
        .positional = &what};
    if (!command_begin(&command, argc, argv, &code))
        goto done;
    if (what.count != 1) {
        snprintf(err.message, sizeof err.message,
                 "name one benchmark: train, prefill, decode, gemm or attention");
        code = command_fail("bench", TRIL_ERR_ARGUMENT, &err);
        goto done;
    }
    o.what = what.values[0];
    if (strcmp(o.what, "attention") == 0) {
        const struct tril_model_overrides *m = &o.source.overrides;
        if (block && !option_pair(block, &a.block_q, &a.block_k)) {
            snprintf(err.message, sizeof err.message,
                     "--block takes two sizes, of queries and keys, as 64,32, not '%.40s'", block);
            code = command_fail("bench", TRIL_ERR_ARGUMENT, &err);
            goto done;
        }
        a.batch = o.batch;
        a.steps = o.steps;
        a.dtype = o.dtype;
        a.kv_dtype = o.kv_dtype;
        a.device = o.device;
        a.seq = o.seq > 0 ? o.seq : 1024;
        a.heads = m->heads > 0 ? m->heads : 8;
        a.kv_heads = m->kv_heads > 0 ? m->kv_heads : 0;
        a.head_dim = m->head_dim > 0 ? m->head_dim : 64;
        a.dropout = m->dropout > 0 ? m->dropout : 0;
        tril_threads_set((int)threads);
        code = bench_attention(&a, &visible, json);
        goto done;
    }
    if (!o.source.model && !o.source.preset && !o.source.config)
        o.source.preset = "gpt2";
    tril_threads_set((int)threads);
    model_flags_apply(&flags, &o.source.overrides);
    tril_status st = tril_bench(&o, &result, &err);
    if (st != TRIL_OK)
        code = command_fail("bench", st, &err);
    else if (json)
        print_json(&o, &result);
    else
        print_text(&o, &result);
done:
    option_list_free(&what);
    option_list_free(&visible);
    return code;
}
