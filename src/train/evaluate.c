/* Evaluation windows in sequential order; the same for every model and every time. */
#include "train/evaluate.h"

#include <stdlib.h>
#include <string.h>

#include "base/progress.h"

tril_status evaluate_split(struct model *m, struct workspace *w, const struct dataset *d,
                           enum dataset_split split, int batch, int seq, int64_t max_tokens,
                           struct evaluation *out, struct tril_error *err) {
    tril_status st = TRIL_OK;
    uint64_t windows = (dataset_tokens(d, split) - 1) / (uint64_t)seq, done_windows = 0;
    size_t n = (size_t)batch * (size_t)seq;
    int32_t *buffer = malloc((3 * n + 1) * sizeof *buffer);
    struct loader loader;
    struct loader_options options = {
        .split = split, .batch = batch, .seq = seq, .order = LOADER_SEQUENTIAL};
    *out = (struct evaluation){0};
    if (!buffer) {
        st = error_set(err, TRIL_ERR_MEMORY, "not enough memory for an evaluation batch");
        goto done;
    }
    if (max_tokens > 0 && windows > (uint64_t)((max_tokens + seq - 1) / seq))
        windows = (uint64_t)((max_tokens + seq - 1) / seq);
    TRY(loader_open(&loader, d, &options, err));
    while (done_windows < windows) {
        struct loader_batch lb = {
            .inputs = buffer, .targets = buffer + n, .offsets = buffer + 2 * n};
        uint64_t rows = windows - done_windows;
        double loss;
        int64_t count;
        loader_next(&loader, &lb);
        if (rows > (uint64_t)batch)
            rows = (uint64_t)batch;
        struct batch b = {.tokens = (int64_t)rows * seq,
                          .sequences = (int64_t)rows,
                          .ids = lb.inputs,
                          .targets = lb.targets,
                          .offsets = lb.offsets};
        TRY(model_loss(m, w, &b, &loss, &count, NULL, err));
        out->loss_sum += loss;
        out->tokens += count;
        done_windows += rows;
    }
done:
    free(buffer);
    return st;
}

tril_status evaluate_tokens(struct model *m, struct workspace *w, const int32_t *ids, int64_t n,
                            int64_t seq, int64_t stride, int64_t batch, float *token_loss,
                            struct evaluation *out, struct tril_error *err) {
    tril_status st = TRIL_OK;
    size_t most = (size_t)(batch * seq);
    int32_t *targets = malloc((2 * most + (size_t)batch + 1) * sizeof *targets);
    int32_t *inputs = targets + most, *offsets = inputs + most;
    float *row_loss = malloc(most * sizeof *row_loss);
    struct progress progress;
    *out = (struct evaluation){0};
    progress_start(&progress, "evaluating", n - 1);
    if (!targets || !row_loss) {
        st = error_set(err, TRIL_ERR_MEMORY, "not enough memory for an evaluation batch");
        goto done;
    }
    if (token_loss && n > 0)
        token_loss[0] = 0;
    /* `scored` counts tokens whose loss is known or due: the next window scores from there on. */
    for (int64_t start = 0, scored = 1; scored < n;) {
        int64_t rows = 0, tokens = 0, first = scored;
        double loss;
        int64_t count;
        offsets[0] = 0;
        for (; rows < batch && scored < n; rows++) {
            int64_t length = n - 1 - start < seq ? n - 1 - start : seq;
            for (int64_t i = 0; i < length; i++) {
                int64_t target = start + i + 1;
                inputs[tokens + i] = ids[start + i];
                targets[tokens + i] = target >= scored ? ids[target] : -1;
            }
            scored = start + length + 1;
            tokens += length;
            offsets[rows + 1] = (int32_t)tokens;
            start += stride;
        }
        struct batch b = {.tokens = tokens,
                          .sequences = rows,
                          .ids = inputs,
                          .targets = targets,
                          .offsets = offsets};
        TRY(model_loss(m, w, &b, &loss, &count, row_loss, err));
        for (int64_t i = 0, at = first; token_loss && i < tokens; i++)
            if (targets[i] >= 0)
                token_loss[at++] = row_loss[i];
        out->loss_sum += loss;
        out->tokens += count;
        progress_update(&progress, scored - 1, NULL);
    }
done:
    progress_end(&progress);
    free(targets);
    free(row_loss);
    return st;
}
