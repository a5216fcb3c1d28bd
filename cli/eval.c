/* tril eval: how well a model predicts a text; its logits and gradients for given ids. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli.h"
#include "input.h"
#include "json.h"
#include "model_options.h"
#include "options.h"
#include "tril/tril.h"

static tril_status eval_ids(const struct tril_eval_options *o, const char *text, const char *logits,
                            const char *grads, bool json, struct tril_error *err) {
    int64_t count;
    double loss = NAN;
    int32_t *ids = ids_parse(text, &count, err);
    if (!ids)
        return err->code ? err->code : TRIL_ERR_MEMORY;
    tril_status st = tril_eval_ids(o, ids, count, logits, grads, &loss, err);
    free(ids);
    if (st != TRIL_OK)
        return st;
    if (json) {
        json_t *root = json_pack("{s:I}", "tokens", (json_int_t)count);
        if (count > 1) {
            json_object_set_new(root, "loss", json_measured(loss));
            json_object_set_new(root, "perplexity", json_measured(exp(loss)));
        }
        json_print(root);
    } else {
        printf("%lld ids, loss %.6f%s%s%s%s\n", (long long)count, loss,
               logits ? "; logits in " : "", logits ? logits : "", grads ? "; gradients in " : "",
               grads ? grads : "");
    }
    return TRIL_OK;
}

static tril_status eval_text(const struct tril_eval_options *o, bool json, struct tril_error *err) {
    struct tril_eval_result r;
    tril_status st = tril_eval(o, &r, err);
    if (st != TRIL_OK)
        return st;
    if (json)
        json_print(json_pack("{s:o, s:o, s:o, s:I, s:I, s:f}", "loss", json_measured(r.loss),
                             "perplexity", json_measured(r.perplexity), "bits_per_byte",
                             json_measured(r.bits_per_byte), "tokens", (json_int_t)r.tokens,
                             "bytes", (json_int_t)r.bytes, "seconds", r.seconds));
    else
        printf("loss %.4f  perplexity %.2f  bits per byte %.4f  (%lld tokens, %lld bytes, %.1f s, "
               "%.0f tokens/s)\n",
               r.loss, r.perplexity, r.bits_per_byte, (long long)r.tokens, (long long)r.bytes,
               r.seconds, (double)r.tokens / r.seconds);
    return TRIL_OK;
}

static tril_status eval_baseline(const struct tril_eval_options *o, const struct option_list *data,
                                 bool json, struct tril_error *err) {
    struct tril_baseline_result r;
    tril_status st = tril_eval_baseline(o, data->values, data->count, 0.1, &r, err);
    if (st != TRIL_OK)
        return st;
    if (json)
        json_print(json_pack("{s:o, s:f, s:I, s:I}", "loss", json_measured(r.loss), "baseline_loss",
                             r.baseline_loss, "train_tokens", (json_int_t)r.train_tokens,
                             "valid_tokens", (json_int_t)r.valid_tokens));
    else
        printf("on the %lld validation tokens\n"
               "  this model                         loss %.4f  perplexity %.2f\n"
               "  interpolated Kneser-Ney 3-grams    loss %.4f  perplexity %.2f  (counts of the "
               "%lld training tokens)\n",
               (long long)r.valid_tokens, r.loss, exp(r.loss), r.baseline_loss,
               exp(r.baseline_loss), (long long)r.train_tokens);
    return TRIL_OK;
}

int cmd_eval(int argc, char **argv) {
    struct tril_eval_options o = {.dtype = "fp32", .device = "cpu"};
    struct tril_error err = {0};
    struct tril_model_overrides overrides = tril_model_overrides_none();
    const char *ids = NULL, *logits = NULL, *grads = NULL;
    struct option_list data = {0};
    bool json = false, baseline = false;
    int64_t threads = 0;
    int code = 0;
    const struct option options[] = {
        {"model", "DIR", "a Hugging Face directory", OPTION_STRING, &o.model, 0, 0, NULL},
        {"tokenizer", "FILE|DIR", "instead of the model's own", OPTION_STRING, &o.tokenizer, 0, 0,
         NULL},
        {.kind = OPTION_HEADING, .help = "A text"},
        {"data", "FILE", "text to predict, as one sequence", OPTION_STRINGS, &data, 0, 0, NULL},
        {"baseline", NULL, "compare with 3-gram counts: --data is divided as tril train does it",
         OPTION_FLAG, &baseline, 0, 0, NULL},
        {"seq", "T", "window (default: the context, at most 1024)", OPTION_INT, &o.seq, 1, 1e9,
         NULL},
        {"stride", "N",
         "tokens between windows; less than --seq gives each token more context "
         "(default: --seq)",
         OPTION_INT, &o.stride, 1, 1e9, NULL},
        {"max-tokens", "N", "of the text (default: all)", OPTION_INT, &o.max_tokens, 2, 1e15, NULL},
        {.kind = OPTION_HEADING, .help = "Token ids"},
        {"ids", "\"1 2 3\"", "instead of a text; needs no tokenizer", OPTION_STRING, &ids, 0, 0,
         NULL},
        {"logits", "FILE", "write logits fp32 [T, V] (safetensors)", OPTION_STRING, &logits, 0, 0,
         NULL},
        {"grads", "FILE", "write the mean next-token loss's gradient for every parameter",
         OPTION_STRING, &grads, 0, 0, NULL},
        {.kind = OPTION_HEADING, .help = "The model, changed where its parameters stay the same"},
        {"context", "N", "longest sequence", OPTION_INT, &overrides.context, 1, 1e8, NULL},
        VIEW_OPTIONS(overrides),
        {"ablate", "LIST", ABLATE_HELP, OPTION_STRING, &o.ablate, 0, 0, NULL},
        {.kind = OPTION_HEADING, .help = "How"},
        {"dtype", "TYPE", "arithmetic of the matrices", OPTION_CHOICE, &o.dtype, 0, 0,
         "fp32|bf16|fp16|tf32"},
        DEVICE_OPTION(&o.device),
        {"threads", "N", "0: all processors", OPTION_INT, &threads, 0, 1024, NULL},
        {"json", NULL, "print one JSON object", OPTION_FLAG, &json, 0, 0, NULL},
    };
    const struct command command = {
        .name = "eval",
        .usage = "--model DIR (--data FILE | --ids \"1 2 3\" --logits FILE) [OPTIONS]",
        .summary =
            "Loss (nats per token), perplexity and bits per byte on a text; or the logits and "
            "gradients for\ngiven token ids. The first token is context only.",
        .examples = "  tril eval --model out --data valid.txt\n"
                    "  tril eval --model gpt2/ --data book.txt --seq 1024 --stride 512 --json\n"
                    "  tril eval --model gpt2/ --ids \"464 3290\" --logits l.safetensors --grads "
                    "g.safetensors",
        .options = options,
        .option_count = sizeof options / sizeof *options,
    };
    if (!command_begin(&command, argc, argv, &code))
        goto done;
    tril_threads_set((int)threads);
    o.overrides = &overrides;
    o.data = data.count ? data.values[0] : NULL;
    tril_status st = TRIL_ERR_ARGUMENT;
    if (ids && o.data)
        snprintf(err.message, sizeof err.message, "--ids and --data exclude each other");
    else if (data.count > 1 && !baseline)
        snprintf(err.message, sizeof err.message, "give one --data FILE (several with --baseline)");
    else
        st = ids        ? eval_ids(&o, ids, logits, grads, json, &err)
             : baseline ? eval_baseline(&o, &data, json, &err)
                        : eval_text(&o, json, &err);
    if (st != TRIL_OK)
        code = command_fail("eval", st, &err);
done:
    option_list_free(&data);
    return code;
}
