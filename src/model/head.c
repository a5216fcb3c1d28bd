/* Final norm, head and loss, in chunks of n rows, so that never more than a chunk of logits [n, V]
 * exists. In training the head's backward pass runs in the same loop, while its chunk is at hand:
 *
 *   x [n, D] -> norm -> y [n, D] -> logits [n, V] -> loss
 *   dlogits [n, V] (in the logits' place) -> dy [n, D] -> dx [n, D];  dW += dlogits^T y */
#include "model/internal.h"

static const struct norm_site final_site = {PARAM_FINAL_NORM_GAIN, PARAM_FINAL_NORM_BIAS, -1};

static const struct weight *head_weight(const struct model *m) {
    return &m->weights[model_head_row(m)];
}

/* Rows of a chunk. A training workspace keeps logits in the compute dtype, because their gradient
 * overwrites them; calls without backward take fp32 logits, so fewer fit into the same memory. */
static int64_t chunk_rows(const struct pass *p) {
    const struct activation_layout *l = &p->w->layout;
    int64_t rows = l->head_rows;
    if (!p->keep && dtype_size(l->shape[A_LOGITS].dtype) == 2)
        rows = rows > 1 ? rows / 2 : 0;
    return rows;
}

static struct tensor logits_view(const struct pass *p, int64_t rows) {
    struct tensor t = activation_view(p->w, A_LOGITS, 0, rows);
    if (!p->keep)
        t.dtype = model_wide(p->m);
    return t;
}

/* The residual stream's rows -> the head's input y [n, D] act. */
static tril_status head_input(struct pass *p, struct tensor x, struct tensor *y,
                              struct tril_error *err) {
    *y = activation_view(p->w, A_FINAL, 0, x.shape[0]);
    if (!p->m->config.final_norm) {
        if (x.dtype == y->dtype) {
            *y = x;
            return TRIL_OK;
        }
        int64_t n = x.shape[0] * x.shape[1];
        return cast(p->ctx, tensor_1d(x.data, x.dtype, n), tensor_1d(y->data, y->dtype, n), err);
    }
    struct tensor mean = activation_view(p->w, A_FINAL_MEAN, 0, x.shape[0]);
    struct tensor rstd = activation_view(p->w, A_FINAL_RSTD, 0, x.shape[0]);
    return norm_forward(p, final_site, x, *y, mean, rstd, err);
}

/* dlogits [n, V], y [n, D] -> dx rows [n, D] fp32 (zero before, or overwritten without a norm). */
static tril_status head_backward(struct pass *p, struct tensor dlogits, struct tensor y,
                                 struct tensor x, struct tensor dx, bool first,
                                 struct tril_error *err) {
    tril_status st;
    const struct model *m = p->m;
    const int64_t n = x.shape[0];
    enum param_role role = m->config.tied ? PARAM_TOKEN_EMBEDDING : PARAM_HEAD;
    TRY(linear_backward_weight(p->ctx, dlogits, y, param_gradient(m, role, -1), tensor_none(),
                               first && p->overwrite, err));
    if (!m->config.final_norm) {
        TRY(linear_backward_input(p->ctx, dlogits, head_weight(m), dx, err));
        goto done;
    }
    struct tensor dy = activation_view(p->w, A_DFINAL, 0, n);
    struct tensor mean = activation_view(p->w, A_FINAL_MEAN, 0, n);
    struct tensor rstd = activation_view(p->w, A_FINAL_RSTD, 0, n);
    TRY(linear_backward_input(p->ctx, dlogits, head_weight(m), dy, err));
    TRY(norm_backward(p, final_site, dy, x, mean, rstd, dx, err));
done:
    return st;
}

/* After all layers: the residual stream's last value. */
static struct tensor last_x(const struct pass *p) {
    int layer = p->w->options.backward ? (int)p->m->config.layers : 0;
    return activation_view(p->w, A_X, layer, p->N);
}

tril_status head_loss(struct pass *p, float scale, struct tril_error *err) {
    tril_status st;
    const struct model *m = p->m;
    const struct backend *b = p->ctx->backend;
    struct tensor all = last_x(p);                                       /* [N, D] */
    struct tensor dx = activation_view(p->w, A_DX, 0, p->N);             /* [N, D] */
    struct tensor total = activation_view(p->w, A_TOTAL, 0, 2);          /* sum, count */
    struct tensor row_loss = activation_view(p->w, A_ROW_LOSS, 0, p->N); /* [N] */
    const int64_t chunk = chunk_rows(p);
    TRY(layer_acquire(m, (int)m->config.layers, err));
    TRY(b->fill_zero(p->ctx, total.data, 2 * (int64_t)sizeof(double), err));
    if (p->keep && m->config.final_norm) /* its backward adds */
        TRY(b->fill_zero(p->ctx, dx.data, tensor_bytes(&dx), err));
    for (int64_t at = 0; at < p->N; at += chunk) {
        int64_t n = p->N - at < chunk ? p->N - at : chunk;
        struct tensor x = tensor_rows(all, at, n), y;
        struct tensor targets = tensor_rows(p->targets, at, n);
        struct tensor logits = logits_view(p, n);                       /* [n, V] */
        struct tensor maximum = activation_view(p->w, A_MAXIMUM, 0, n); /* [n] */
        struct tensor sum = activation_view(p->w, A_SUM, 0, n);         /* [n] */
        struct tensor target = activation_view(p->w, A_TARGET, 0, n);   /* [n] */
        TRY(head_input(p, x, &y, err));
        hook(p, -1, "head input", y);
        TRY(linear_forward(p->ctx, y, head_weight(m), tensor_none(), tensor_none(), logits,
                           tensor_none(), ACT_NONE, err));
        hook(p, -1, "logits", logits);
        TRY(cross_entropy_forward(p->ctx, logits, targets, maximum, sum, target, err));
        TRY(cross_entropy_loss(p->ctx, targets, maximum, sum, target, tensor_rows(row_loss, at, n),
                               total, err));
        if (!p->keep)
            continue;
        TRY(cross_entropy_backward(p->ctx, logits, targets, maximum, sum, logits, scale, err));
        TRY(head_backward(p, logits, y, x, tensor_rows(dx, at, n), at == 0, err));
    }
    TRY(layer_release(m, (int)m->config.layers, err));
    if (p->keep)
        TRY(layer_gradient_ready(m, (int)m->config.layers, err));
done:
    return st;
}

/* Logits [n, V] fp32 of the wanted rows at .. at + n. */
static tril_status chunk_logits(struct pass *p, int64_t at, int64_t n, struct tril_error *err) {
    tril_status st;
    struct tensor x, y, logits = logits_view(p, n);
    if (p->gather_early) {
        x = activation_view(p->w, A_ROWS_X, 0, n);
    } else if (p->rows.data) {
        x = activation_view(p->w, A_ROWS_X, 0, n);
        TRY(gather_rows(p->ctx, last_x(p), tensor_rows(p->rows, at, n), x, err));
    } else {
        x = tensor_rows(last_x(p), at, n);
    }
    TRY(head_input(p, x, &y, err));
    hook(p, -1, "head input", y);
    TRY(linear_forward(p->ctx, y, head_weight(p->m), tensor_none(), tensor_none(), logits,
                       tensor_none(), ACT_NONE, err));
    hook(p, -1, "logits", logits);
done:
    return st;
}

tril_status head_forward(struct pass *p, struct tril_error *err) {
    tril_status st = TRIL_OK;
    const int head = (int)p->m->config.layers;
    if (p->draw && p->wanted > chunk_rows(p))
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "tokens are drawn from %lld rows; the workspace holds the logits of %lld",
                         (long long)p->wanted, (long long)chunk_rows(p));
    if (p->wanted == 0 || p->wanted > chunk_rows(p))
        return TRIL_OK;
    if (model_wide(p->m) != DT_F32)
        return error_set(err, TRIL_ERR_UNSUPPORTED, "a model in double gives losses, not logits");
    TRY(layer_acquire(p->m, head, err));
    TRY(chunk_logits(p, 0, p->wanted, err));
    TRY(layer_release(p->m, head, err));
    if (p->draw)
        TRY(sample(p->ctx, logits_view(p, p->wanted), p->draw, err));
done:
    return st;
}

tril_status head_logits(struct pass *p, float *out, struct tril_error *err) {
    tril_status st = TRIL_OK;
    const struct backend *b = p->ctx->backend;
    const int head = (int)p->m->config.layers;
    const int64_t V = p->m->config.vocab, chunk = chunk_rows(p);
    if (p->wanted == 0)
        return b->synchronise(p->ctx, err);
    if (p->wanted <= chunk) {
        struct tensor logits = logits_view(p, p->wanted);
        return b->download(p->ctx, out, logits.data, tensor_bytes(&logits), err);
    }
    if (model_wide(p->m) != DT_F32)
        TRY(error_set(err, TRIL_ERR_UNSUPPORTED, "a model in double gives losses, not logits"));
    TRY(layer_acquire(p->m, head, err));
    for (int64_t at = 0; at < p->wanted; at += chunk) {
        int64_t n = p->wanted - at < chunk ? p->wanted - at : chunk;
        struct tensor logits = logits_view(p, n);
        TRY(chunk_logits(p, at, n, err));
        TRY(b->download(p->ctx, out + at * V, logits.data, tensor_bytes(&logits), err));
    }
    TRY(layer_release(p->m, head, err));
done:
    return st;
}

/* What model_loss computes. */
static tril_status loss_body(void *arg, struct tril_error *err) {
    struct pass *p = arg;
    tril_status st;
    TRY(layers_forward(p, err));
    TRY(head_loss(p, 0, err));
done:
    return st;
}

tril_status model_loss(struct model *m, struct workspace *w, const struct batch *b,
                       double *loss_sum, int64_t *count, float *row_loss, struct tril_error *err) {
    tril_status st;
    struct pass p;
    TRY(pass_begin(&p, m, w, b, true, NULL, err));
    p.wanted = p.N;
    TRY(pass_run(&p, "loss", 0, loss_body, &p, err));
    TRY(loss_download(&p, loss_sum, count, row_loss, err));
    recall_end(&p);
done:
    return st;
}

tril_status loss_download(struct pass *p, double *loss_sum, int64_t *count, float *row_loss,
                          struct tril_error *err) {
    tril_status st;
    const struct backend *b = p->ctx->backend;
    double total[2];
    TRY(b->download(p->ctx, total, activation_view(p->w, A_TOTAL, 0, 2).data, sizeof total, err));
    if (row_loss) {
        struct tensor t = activation_view(p->w, A_ROW_LOSS, 0, p->N);
        if (t.dtype != DT_F32)
            TRY(error_set(err, TRIL_ERR_UNSUPPORTED, "losses per row come in fp32 only"));
        TRY(b->download(p->ctx, row_loss, t.data, tensor_bytes(&t), err));
    }
    *loss_sum = total[0];
    *count = (int64_t)total[1];
done:
    return st;
}
