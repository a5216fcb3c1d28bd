/* tril train: options to a training run, and what it prints at the end. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "cli.h"
#include "json.h"
#include "model_options.h"
#include "options.h"
#include "tril/tril.h"

/* --resume --out DIR alone must do: the saved options become the defaults before parsing. */
static bool wants_resume(int argc, char **argv, const char **out) {
    bool resume = false;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--resume") == 0)
            resume = true;
        if (strcmp(argv[i], "--out") == 0 && i + 1 < argc)
            *out = argv[i + 1];
        if (strncmp(argv[i], "--out=", 6) == 0)
            *out = argv[i] + 6;
    }
    return resume && *out;
}

static void print_result(const struct tril_train_options *o, const struct tril_train_result *r,
                         bool json) {
    if (json) {
        json_t *root =
            json_pack("{s:I, s:I, s:o, s:f, s:f, s:I, s:s}", "steps", (json_int_t)r->steps,
                      "tokens", (json_int_t)r->tokens, "loss", json_measured(r->loss), "seconds",
                      r->seconds, "tokens_per_s", r->tokens_per_second, "parameters",
                      (json_int_t)r->parameters, "out", o->out);
        if (isfinite(r->valid_loss))
            json_object_set_new(root, "valid_loss", json_real(r->valid_loss));
        if (r->peak_device_bytes > 0)
            json_object_update_new(root, json_pack("{s:f, s:f, s:f}", "predicted_device_bytes",
                                                   r->predicted_device_bytes, "peak_device_bytes",
                                                   r->peak_device_bytes, "peak_pinned_bytes",
                                                   r->peak_pinned_bytes));
        json_print(root);
        return;
    }
    if (o->quiet)
        return;
    if (o->init_only) {
        printf("initial model written to %s\n", o->out);
        return;
    }
    if (isfinite(r->loss))
        printf("\n%lld steps, %lld tokens in %.1f s (%.0f tokens/s); loss %.4f",
               (long long)r->steps, (long long)r->tokens, r->seconds, r->tokens_per_second,
               r->loss);
    else
        printf("\nthere was nothing left to do: all %lld steps (%lld tokens) were done before",
               (long long)r->steps, (long long)r->tokens);
    if (isfinite(r->valid_loss))
        printf(", validation %.4f (perplexity %.2f)", r->valid_loss, exp(r->valid_loss));
    if (r->peak_device_bytes > 0)
        printf("\nGPU memory: %.1f MB (predicted %.1f)", r->peak_device_bytes / 1e6,
               r->predicted_device_bytes / 1e6);
    if (r->peak_pinned_bytes > 0)
        printf(", and %.1f MB of the host's", r->peak_pinned_bytes / 1e6);
    printf("\nmodel in %s; try: tril generate --model %s --prompt \"...\"\n", o->out, o->out);
}

int cmd_train(int argc, char **argv) {
    struct tril_train_options o = tril_train_defaults();
    struct tril_train_result result;
    struct tril_error err = {0};
    struct option_list data = {0};
    void *storage = NULL;
    const char *resume_out = NULL;
    bool json = false;
    struct model_flags flags = {0};
    int64_t seed;
    int code = 0;
    if (wants_resume(argc, argv, &resume_out)) {
        tril_status st = tril_train_options_saved(resume_out, &o, &storage, &err);
        if (st != TRIL_OK)
            return command_fail("train", st, &err);
    }
    seed = (int64_t)o.seed;
    const struct option options[] = {
        {.kind = OPTION_HEADING, .help = "Data"},
        {"data", "FILE|DIR...", "text files; a directory means its .txt files", OPTION_STRINGS,
         &data, 0, 0, NULL},
        {"valid", "FILE", "validation text (default: the last --valid-fraction of the data)",
         OPTION_STRING, &o.valid, 0, 0, NULL},
        {"valid-fraction", "X", "part of the data kept for validation (0.1)", OPTION_NUMBER,
         &o.valid_fraction, 0, 0.9, NULL},
        {"marker", "LINE", "a line that separates documents (default: <|endoftext|> in the text)",
         OPTION_STRING, &o.marker, 0, 0, NULL},
        {"order", "ORDER", "shuffled windows, sequential ones, or rows that go on", OPTION_CHOICE,
         &o.order, 0, 0, "shuffled|sequential|streams"},
        {"mask-documents", NULL, "documents in one row do not see each other", OPTION_FLAG,
         &o.mask_documents, 0, 0, NULL},
        {"cache", "DIR", "where token shards are kept", OPTION_STRING, &o.cache, 0, 0, NULL},
        {.kind = OPTION_HEADING, .help = "Tokenizer"},
        {"tokenizer", "FILE|DIR", "use this one (default: train one on the data)", OPTION_STRING,
         &o.tokenizer, 0, 0, NULL},
        {"vocab", "N", "size of a tokenizer to be trained (default: the preset's)", OPTION_INT,
         &o.vocab, 257, 1 << 24, NULL},
        {"pattern", "NAME", "its pre-tokenisation pattern", OPTION_CHOICE, &o.pattern, 0, 0,
         "gpt2|cl100k"},
        {.kind = OPTION_HEADING, .help = "Model"},
        {"model", "DIR", "go on from this model", OPTION_STRING, &o.model, 0, 0, NULL},
        {"preset", "NAME", "model3, nano (default), gpt2, gpt2-medium/-large/-xl, llama-110m/-1b",
         OPTION_STRING, &o.preset, 0, 0, NULL},
        {"config", "FILE", "a config.json", OPTION_STRING, &o.config, 0, 0, NULL},
        MODEL_OPTIONS(o.overrides, flags),
        {.kind = OPTION_HEADING, .help = "Optimisation"},
        {"batch", "B", "rows of a micro-batch (8)", OPTION_INT, &o.batch, 1, 65536, NULL},
        {"seq", "T", "tokens of a row (256, or the context)", OPTION_INT, &o.seq, 1, 1 << 24, NULL},
        {"grad-accum", "N", "micro-batches a step (1)", OPTION_INT, &o.grad_accum, 1, 65536, NULL},
        {"steps", "N", "optimiser steps (default: ten epochs, 200 to 5000 steps)", OPTION_INT,
         &o.steps, 0, 1e12, NULL},
        {"epochs", "E", "passes over the data", OPTION_NUMBER, &o.epochs, 0, 1e9, NULL},
        {"tokens", "N", "tokens to train on", OPTION_INT, &o.tokens, 0, 1e15, NULL},
        {"lr", "X", "learning rate (3e-4)", OPTION_NUMBER, &o.lr, 0, 10, NULL},
        {"min-lr-fraction", "X", "where the schedule ends, of --lr (0.1)", OPTION_NUMBER,
         &o.min_lr_fraction, 0, 1, NULL},
        {"warmup-frac", "F", "part of the steps with a rising rate (0.05)", OPTION_NUMBER,
         &o.warmup_fraction, 0, 1, NULL},
        {"schedule", "NAME", "of the learning rate", OPTION_CHOICE, &o.schedule, 0, 0,
         "cosine|linear|constant"},
        {"beta1", "X", "AdamW's (0.9)", OPTION_NUMBER, &o.beta1, 0, 0.999999, NULL},
        {"beta2", "X", "AdamW's (0.95)", OPTION_NUMBER, &o.beta2, 0, 0.9999999, NULL},
        {"eps", "X", "AdamW's (1e-8)", OPTION_NUMBER, &o.eps, 0, 1, NULL},
        {"weight-decay", "X", "on matrices only (0.1)", OPTION_NUMBER, &o.weight_decay, 0, 10,
         NULL},
        {"clip", "X", "limit of the gradient norm; 0: none (1)", OPTION_NUMBER, &o.clip, 0, 1e9,
         NULL},
        {"seed", "S", "of everything random (1337)", OPTION_INT, &seed, 0, 0, NULL},
        {.kind = OPTION_HEADING, .help = "Arithmetic and memory"},
        {"dtype", "TYPE", "weights and activations; masters and sums are fp32", OPTION_CHOICE,
         &o.dtype, 0, 0, "bf16|fp32|fp16|tf32"},
        {"recompute", "WHAT", "activations computed again in the backward pass", OPTION_CHOICE,
         &o.recompute, 0, 0, "none|selective|full"},
        {"offload", "WHAT", "what waits in the host's memory (--device cuda)", OPTION_CHOICE,
         &o.offload, 0, 0, "none|optimizer|activations|all"},
        DEVICE_OPTION(&o.device),
        {"threads", "N", "0: all processors", OPTION_INT, &o.threads, 0, 1024, NULL},
        {.kind = OPTION_HEADING, .help = "Output"},
        {"out", "DIR", "the model, its checkpoints, log and loss curve", OPTION_STRING, &o.out, 0,
         0, NULL},
        {"resume", NULL, "go on from the newest checkpoint in --out, bit for bit", OPTION_FLAG,
         &o.resume, 0, 0, NULL},
        {"init-only", NULL, "write the initial model and stop", OPTION_FLAG, &o.init_only, 0, 0,
         NULL},
        {"eval-every", "N", "steps between validations; 0: none (default: 20 a run)", OPTION_INT,
         &o.eval_every, 0, 1e12, NULL},
        {"eval-tokens", "N", "tokens of a validation; 0: all (65536)", OPTION_INT, &o.eval_tokens,
         0, 1e15, NULL},
        {"checkpoint-every", "N", "steps between checkpoints; 0: none (as validations)", OPTION_INT,
         &o.checkpoint_every, 0, 1e12, NULL},
        {"keep", "N", "checkpoints kept, beside the best (2)", OPTION_INT, &o.keep, 1, 1e6, NULL},
        {"save-dtype", "TYPE", "of model.safetensors", OPTION_CHOICE, &o.save_dtype, 0, 0,
         "fp32|bf16"},
        {"sample-every", "N", "steps between samples; 0: none", OPTION_INT, &o.sample_every, 0,
         1e12, NULL},
        {"sample-tokens", "N", "tokens of a sample (64)", OPTION_INT, &o.sample_tokens, 1, 1e6,
         NULL},
        {"sample-prompt", "TEXT", "what samples continue", OPTION_STRING, &o.sample_prompt, 0, 0,
         NULL},
        {"log", "FILE", "JSON lines (default: OUT/log.jsonl)", OPTION_STRING, &o.log, 0, 0, NULL},
        {"quiet", NULL, "nothing on the terminal", OPTION_FLAG, &o.quiet, 0, 0, NULL},
        {"json", NULL, "print the result as one JSON object", OPTION_FLAG, &json, 0, 0, NULL},
    };
    const struct command command = {
        .name = "train",
        .usage = "--data FILE|DIR... --out DIR [OPTIONS]",
        .summary =
            "Trains a model on text: from scratch (a byte-level BPE tokenizer is trained too), or "
            "from an\nexisting model. DIR becomes a Hugging Face directory. Ctrl-C saves a "
            "checkpoint; --resume goes on.",
        .examples =
            "  tril train --data book.txt --out model\n"
            "  tril train --resume --out model\n"
            "  tril train --data texts/ --out model --preset gpt2 --tokenizer gpt2/ --batch 4 "
            "--seq 1024 --grad-accum 16 --steps 10000\n"
            "  tril train --data mine.txt --model gpt2/ --out tuned --lr 1e-4 --epochs 2",
        .options = options,
        .option_count = sizeof options / sizeof *options};
    if (!command_begin(&command, argc, argv, &code))
        goto done;
    if (data.count > 0) {
        o.data = data.values;
        o.data_count = data.count;
    }
    o.seed = (uint64_t)seed;
    model_flags_apply(&flags, &o.overrides);
    tril_signals_catch();
    tril_status st = tril_train(&o, &result, &err);
    if (st != TRIL_OK)
        code = command_fail("train", st, &err);
    else
        print_result(&o, &result, json);
done:
    option_list_free(&data);
    tril_train_options_free(storage);
    return code;
}
