/* Token and position embedding (contract: src/ops/embed.c).
 *
 * The backward is cut into columns, not into tokens: every chunk adds all tokens' parts of its
 * columns in the order of n, so that the sums are those of the reference's order whatever the
 * threads, and no two threads write the same element. */
#include "cpu/kernels/loops.h"
#include "ops/reference.h"

struct embed {
    struct tensor tokens, positions, wte, wpe, x; /* of the backward: dwte, dwpe, dx */
};

static tril_status check_indices(const char *name, const struct embed *e, struct tril_error *err) {
    tril_status st = TRIL_OK;
    int64_t ignored;
    for (int64_t n = 0; n < e->x.shape[0]; n++) {
        TRY(ref_index(name, "tokens", &e->tokens, n, e->wte.shape[0], &ignored, err));
        if (e->wpe.data)
            TRY(ref_index(name, "positions", &e->positions, n, e->wpe.shape[0], &ignored, err));
    }
done:
    return st;
}

/* ------------------------------------------------------------------ forward */

static void forward_tokens(void *arg, int64_t begin, int64_t end, int worker) {
    (void)worker;
    const struct embed *e = arg;
    int64_t D = e->x.shape[1];
    float *x = e->x.data;
    const int32_t *tokens = e->tokens.data, *positions = e->positions.data;
    bool learned = e->wpe.data != NULL;
    enum dtype wpe = learned ? e->wpe.dtype : DT_F32;
    FOR_FLOAT(tt, e->wte.dtype, FOR_FLOAT(tp, wpe, {
                  for (int64_t n = begin; n < end; n++) {
                      int64_t token = tokens[n] * D, position = learned ? positions[n] * D : 0;
                      VF_FOR(i, 0, D, {
                          vf v = vf_load_as(e->wte.data, tt, token + i, lanes);
                          if (learned)
                              v += vf_load_as(e->wpe.data, tp, position + i, lanes);
                          vf_store_n(x + n * D + i, v, lanes);
                      });
                  }
              }););
}

static tril_status forward_kernel(struct op_context *ctx, const struct tensor *a,
                                  const void *params, struct tril_error *err) {
    (void)ctx;
    (void)params;
    struct embed e = {a[0], a[1], a[2], a[3], a[4]};
    int64_t N = e.x.shape[0], D = e.x.shape[1];
    tril_status st = check_indices("embed_forward", &e, err);
    int64_t bytes = 4 + (int64_t)dtype_size(e.wte.dtype) * (e.wpe.data ? 2 : 1);
    if (st == TRIL_OK)
        parallel_for(N, chunk_items(N, D * bytes), forward_tokens, &e);
    return st;
}

/* ------------------------------------------------------------------ backward */

static void backward_columns(void *arg, int64_t begin, int64_t end, int worker) {
    (void)worker;
    const struct embed *e = arg;
    int64_t N = e->x.shape[0], D = e->x.shape[1];
    const float *dx = e->x.data;
    float *dwte = e->wte.data, *dwpe = e->wpe.data;
    const int32_t *tokens = e->tokens.data, *positions = e->positions.data;
    for (int64_t n = 0; n < N; n++) {
        float *token = dwte + tokens[n] * D, *position = dwpe ? dwpe + positions[n] * D : NULL;
        VF_FOR(i, begin, end, {
            vf d = vf_load_n(dx + n * D + i, lanes);
            vf_store_n(token + i, vf_load_n(token + i, lanes) + d, lanes);
            if (position)
                vf_store_n(position + i, vf_load_n(position + i, lanes) + d, lanes);
        });
    }
}

static tril_status backward_kernel(struct op_context *ctx, const struct tensor *a,
                                   const void *params, struct tril_error *err) {
    enum { COLUMNS = 128 }; /* per chunk, at least: 512 contiguous bytes */
    (void)ctx;
    (void)params;
    struct embed e = {a[0], a[1], a[3], a[4], a[2]};
    tril_status st = check_indices("embed_backward", &e, err);
    if (st != TRIL_OK)
        return st;
    int64_t N = e.x.shape[0], D = e.x.shape[1];
    int64_t grain = chunk_elements(D, 12 * N);
    parallel_for(D, grain < COLUMNS ? COLUMNS : grain, backward_columns, &e);
    return TRIL_OK;
}

void LEVEL(register_embed)(struct backend *b) {
    b->table[OP_EMBED_FORWARD] = forward_kernel;
    b->table[OP_EMBED_BACKWARD] = backward_kernel;
}
