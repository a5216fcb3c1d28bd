/* tril attention: the operation by itself, on tensors of the user's own; pictures of its rules. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli.h"
#include "json.h"
#include "options.h"
#include "tril/tril.h"

static tril_status fail(struct tril_error *err, const char *message, const char *value) {
    err->code = TRIL_ERR_ARGUMENT;
    snprintf(err->message, sizeof err->message, message, value);
    return TRIL_ERR_ARGUMENT;
}

static tril_status draw(const char *visible, const char *size, int64_t head, const char *path,
                        struct tril_error *err) {
    int64_t rows = 32, columns = 32;
    if (size && !option_pair(size, &rows, &columns))
        return fail(err, "--size takes rows and columns, as 32,48, not '%.40s'", size);
    return tril_attention_draw(visible, head, rows, columns, path, err);
}

static tril_status compute(struct tril_attention_file *f, const char *block, bool json,
                           struct tril_error *err) {
    struct tril_attention_file_result r;
    if (!f->in)
        return fail(err, "name the tensors' file with --qkv IN.safetensors%s", "");
    if (!f->out)
        return fail(err, "say where the results go with --out OUT.safetensors%s", "");
    if (block && !option_pair(block, &f->block_q, &f->block_k))
        return fail(err, "--block takes two sizes, of queries and keys, as 64,32, not '%.40s'",
                    block);
    tril_status st = tril_attention_file(f, &r, err);
    if (st != TRIL_OK)
        return st;
    if (json) {
        json_print(json_pack("{s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:s, s:s, s:s, s:f, s:f, "
                             "s:f}",
                             "batch", (json_int_t)r.batch, "heads", (json_int_t)r.heads, "kv_heads",
                             (json_int_t)r.kv_heads, "queries", (json_int_t)r.queries, "keys",
                             (json_int_t)r.keys, "head_dim", (json_int_t)r.width, "block_q",
                             (json_int_t)r.block_q, "block_k", (json_int_t)r.block_k, "dtype",
                             r.dtype, "implementation", f->implementation, "device", f->device,
                             "forward_ms", r.forward_seconds * 1e3, "backward_ms",
                             r.backward_seconds * 1e3, "scratch_bytes", r.scratch_bytes));
        return TRIL_OK;
    }
    printf("%s: B=%lld H=%lld Hk=%lld T=%lld Tk=%lld d=%lld %s, forward %.2f ms", f->out,
           (long long)r.batch, (long long)r.heads, (long long)r.kv_heads, (long long)r.queries,
           (long long)r.keys, (long long)r.width, r.dtype, r.forward_seconds * 1e3);
    if (f->gradients)
        printf(", backward %.2f ms", r.backward_seconds * 1e3);
    printf(", %.1f MB of scratch\n", r.scratch_bytes / 1e6);
    return TRIL_OK;
}

int cmd_attention(int argc, char **argv) {
    struct tril_attention_file f = {.implementation = "flash", .device = "cpu", .scale = NAN};
    struct option_list visible = {0};
    struct tril_error err = {0};
    const char *block = NULL, *picture = NULL, *size = NULL;
    int64_t threads = 0, seed = 0, head = 0;
    char *rules = NULL;
    bool json = false;
    int code = 0;
    const struct option options[] = {
        {"qkv", "IN", "q [B,H,T,d], k and v [B,Hk,Tk,d]; optionally do, bias, sink, blocks",
         OPTION_STRING, &f.in, 0, 0, NULL},
        {"out", "OUT", "o, lse [B,H,T]; as asked p, dq, dk, dv, dbias, dsink", OPTION_STRING,
         &f.out, 0, 0, NULL},
        {"impl", "NAME", "which of the ways to compute it (flash)", OPTION_CHOICE,
         &f.implementation, 0, 0, "flash|fused|materialised|reference|linear"},
        {"dtype", "TYPE", "the tensors are converted to it first (default: q's)", OPTION_CHOICE,
         &f.dtype, 0, 0, "fp32|bf16|fp16"},
        {"grads", NULL, "gradients, from the tensor do, the gradient of o", OPTION_FLAG,
         &f.gradients, 0, 0, NULL},
        {"probs", NULL, "the probabilities p [B,H,T,Tk] that multiply v (after dropout)",
         OPTION_FLAG, &f.probabilities, 0, 0, NULL},
        {.kind = OPTION_HEADING, .help = "What is seen"},
        {"visible", "RULE",
         "parts joined by '+' (causal); 0-3=RULE: for these heads, again for "
         "others",
         OPTION_REPEATED, &visible, 0, 0, NULL},
        {"block", "Q,K",
         "rows and keys of flash's tiles (chosen); with the rule blocks, "
         "also its blocks' sizes (64,64)",
         OPTION_STRING, &block, 0, 0, NULL},
        {.kind = OPTION_HEADING, .help = "Scores"},
        {"scale", "X", "multiplies q.k (1 / sqrt(d))", OPTION_NUMBER, &f.scale, 0, 0, NULL},
        {"softcap", "X", "X tanh(score / X); 0: none", OPTION_NUMBER, &f.softcap, 0, 1e30, NULL},
        {"alibi", NULL, "subtract slope |i - j|, the usual slopes", OPTION_FLAG, &f.alibi, 0, 0,
         NULL},
        {"dropout", "P", "of the probabilities", OPTION_NUMBER, &f.dropout, 0, 0.999999, NULL},
        {"seed", "S", "of the dropout (0)", OPTION_INT, &seed, 0, 0, NULL},
        {.kind = OPTION_HEADING, .help = "A picture instead"},
        {"draw", "FILE.svg", "draw the mask of --visible; needs no tensors", OPTION_STRING,
         &picture, 0, 0, NULL},
        {"size", "T,Tk", "its rows and columns, up to 256 (32,32)", OPTION_STRING, &size, 0, 0,
         NULL},
        {"head", "N", "whose rule is drawn (0)", OPTION_INT, &head, 0, 4095, NULL},
        {.kind = OPTION_HEADING, .help = "How"},
        {"device", "NAME", "cuda: on a GPU (not --impl fused); times hold the transfers",
         OPTION_CHOICE, &f.device, 0, 0, "cpu|cuda|reference"},
        {"threads", "N", "0: all processors", OPTION_INT, &threads, 0, 1024, NULL},
        {"json", NULL, "print one JSON object", OPTION_FLAG, &json, 0, 0, NULL},
    };
    const struct command command = {
        .name = "attention",
        .usage = "--qkv IN.safetensors --out OUT.safetensors [OPTIONS]",
        .summary =
            "Attention, forward and backward, on tensors of your own. Scores are softcap(scale "
            "q.k), then\n-slope |i - j| (ALiBi) and bias are added, then what the rule hides is "
            "cut "
            "off; a sink is one\nmore logit per head in the denominator. A row that sees nothing "
            "gives zeros and lse = -inf.\n\n"
            "A RULE is causal (the default) or full, and a union of what row i may see of column "
            "j, "
            "aligned at\nthe last row and column:\n"
            "  window:N     |i-j| < N              strided:L   |i-j| < L or (i-j) mod L = 0\n"
            "  sinks:N      j < N                  fixed:L,C   i/L = j/L (whole) or j mod L >= "
            "L-C\n"
            "  global:a,b   i or j is a or b       chunk:N     i/N = j/N (whole)\n"
            "  dilated:N,s  (i-j) mod s = 0 and    blocks      the tensor blocks "
            "[ceil(T/Q), ceil(Tk/K)],\n"
            "               |i-j| < N s                        1 = visible",
        .examples =
            "  tril attention --qkv in.safetensors --out out.safetensors --grads\n"
            "  tril attention --qkv in.safetensors --out out.safetensors --visible "
            "causal+window:256+sinks:4 --dtype bf16\n"
            "  tril attention --qkv in.safetensors --out out.safetensors --visible 0-3=window:64 "
            "--visible 4-7=full --alibi --probs\n"
            "  tril attention --visible fixed:8,2 --draw mask.svg --size 32,32",
        .options = options,
        .option_count = sizeof options / sizeof *options};
    if (!command_begin(&command, argc, argv, &code))
        goto done;
    tril_threads_set((int)threads);
    f.seed = (uint64_t)seed;
    if (visible.count && !(f.visible = rules = option_list_join(&visible))) {
        code = command_fail("attention", TRIL_ERR_MEMORY, &err);
        goto done;
    }
    tril_status st =
        picture ? draw(rules, size, head, picture, &err) : compute(&f, block, json, &err);
    if (st != TRIL_OK)
        code = command_fail("attention", st, &err);
done:
    free(rules);
    option_list_free(&visible);
    return code;
}
