/* tril bench attention: one operation's times, rates and memory. */
#include "bench_attention.h"

#include <stdio.h>
#include <stdlib.h>

#include "cli.h"
#include "json.h"
#include "tril/tril.h"

static void put(json_t *root, const char *name, double value) {
    json_object_set_new(root, name, json_real(value));
}

static void put_int(json_t *root, const char *name, int64_t value) {
    json_object_set_new(root, name, json_integer(value));
}

static void print_json(const struct tril_bench_attention_options *o,
                       const struct tril_bench_attention_result *r) {
    struct tril_build_info info;
    tril_build_info_get(&info);
    json_t *root =
        json_pack("{s:s, s:s, s:s, s:s, s:s}", "what", o->decode ? "decode" : "attention",
                  "implementation", o->implementation, "device", o->device, "dtype", o->dtype,
                  "visible", o->visible ? o->visible : "causal");
    put_int(root, "batch", o->batch);
    put_int(root, "heads", o->heads);
    put_int(root, "kv_heads", o->kv_heads ? o->kv_heads : o->heads);
    put_int(root, "head_dim", o->head_dim);
    put_int(root, "steps", o->steps);
    put(root, "forward_ms", r->forward_ms);
    put(root, "forward_ms_min", r->forward_ms_min);
    put(root, "forward_flops_per_s", r->forward_flops_per_s);
    put(root, "bytes_moved", r->bytes_moved);
    put(root, "extra_bytes", r->extra_bytes);
    put(root, "pairs", r->pairs);
    if (o->decode) {
        put_int(root, "cache", o->cache);
        put_int(root, "page", o->page);
        json_object_set_new(root, "kv_dtype", json_string(o->kv_dtype ? o->kv_dtype : o->dtype));
        put_int(root, "caches", r->caches);
        put(root, "bandwidth_bytes_per_s", r->bandwidth);
        put(root, "bandwidth_fraction", r->bandwidth_fraction);
    } else {
        put_int(root, "seq", o->seq);
        put_int(root, "keys", o->keys ? o->keys : o->seq);
        put(root, "forward_extra_bytes", r->forward_extra_bytes);
        if (!o->forward_only) {
            put(root, "backward_ms", r->backward_ms);
            put(root, "backward_ms_min", r->backward_ms_min);
            put(root, "backward_flops_per_s", r->backward_flops_per_s);
            put(root, "backward_bytes_moved", r->backward_bytes_moved);
            put(root, "backward_extra_bytes", r->backward_extra_bytes);
        }
    }
    put_int(root, "block_q", r->block_q);
    put_int(root, "block_k", r->block_k);
    put(root, "peak_flops", r->peak_flops);
    put(root, "peak_rss_bytes", r->peak_rss_bytes);
    json_object_set_new(root, "isa", json_string(r->isa));
    put_int(root, "threads", r->threads);
    json_object_set_new(root, "processor", json_string(info.processor));
    json_print(root);
}

static void print_rate(const char *name, double ms, double fastest, double rate, double peak) {
    bool small = ms < 0.1;
    printf("  %-9s %10.3f %s (fastest %.3f)  %8.1f GFLOP/s useful, %3.0f%% of the peak\n", name,
           small ? ms * 1e3 : ms, small ? "us" : "ms", small ? fastest * 1e3 : fastest, rate / 1e9,
           100 * rate / peak);
}

static void print_text(const struct tril_bench_attention_options *o,
                       const struct tril_bench_attention_result *r) {
    printf("%s %s, B=%lld H=%lld Hk=%lld d=%lld ", o->implementation, o->dtype, (long long)o->batch,
           (long long)o->heads, (long long)(o->kv_heads ? o->kv_heads : o->heads),
           (long long)o->head_dim);
    if (o->decode)
        printf("against %lld keys of %s", (long long)o->cache,
               o->kv_dtype ? o->kv_dtype : o->dtype);
    else
        printf("T=%lld Tk=%lld, %s", (long long)o->seq, (long long)(o->keys ? o->keys : o->seq),
               o->visible ? o->visible : "causal");
    printf("; peak %.3f TFLOP/s, %s, %d threads\n", r->peak_flops / 1e12, r->isa, r->threads);
    print_rate("forward", r->forward_ms, r->forward_ms_min, r->forward_flops_per_s, r->peak_flops);
    if (!o->decode && !o->forward_only)
        print_rate("backward", r->backward_ms, r->backward_ms_min, r->backward_flops_per_s,
                   r->peak_flops);
    if (o->decode)
        printf("  %.1f MB read a token, %.1f GB/s of %.1f GB/s: %.0f%% (%lld caches in turn)\n",
               r->bytes_moved / 1e6, r->bytes_moved / r->forward_ms / 1e6, r->bandwidth / 1e9,
               100 * r->bandwidth_fraction, (long long)r->caches);
    printf("  %.2f MB of scratch", r->extra_bytes / 1e6);
    if (r->block_q)
        printf(", tiles of %lld rows and %lld keys", (long long)r->block_q, (long long)r->block_k);
    putchar('\n');
}

int bench_attention(struct tril_bench_attention_options *o, const struct option_list *visible,
                    bool json) {
    struct tril_bench_attention_result r;
    struct tril_error err = {0};
    char *rules = NULL;
    if (visible->count && !(rules = option_list_join(visible)))
        return command_fail("bench", TRIL_ERR_MEMORY, &err);
    o->visible = rules;
    if (!o->implementation)
        o->implementation = "flash";
    if (o->decode && !o->cache)
        o->cache = 8192;
    tril_status st = tril_bench_attention(o, &r, &err);
    if (st == TRIL_OK)
        (json ? print_json : print_text)(o, &r);
    free(rules);
    return st == TRIL_OK ? 0 : command_fail("bench", st, &err);
}
