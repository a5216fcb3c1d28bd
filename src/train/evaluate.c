/* Evaluation windows in sequential order; the same for every model and every time. */
#include "train/evaluate.h"

#include <stdlib.h>

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
