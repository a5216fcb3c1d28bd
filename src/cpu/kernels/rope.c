/* Rotary position embedding in place (contract and formula: src/ops/rope.c). */
#include "cpu/kernels/loops.h"
#include "ops/reference.h"

struct rope {
    struct tensor x, positions, cos, sin;
    bool interleaved;
    float direction; /* -1: by the negative angle */
};

/* Even and odd elements of (a, b), and back. */
#if VF_WIDTH == 16
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#define ZIP_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define ZIP_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif VF_WIDTH == 8
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define ODD 1, 3, 5, 7, 9, 11, 13, 15
#define ZIP_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define ZIP_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define EVEN 0, 2, 4, 6
#define ODD 1, 3, 5, 7
#define ZIP_LOW 0, 4, 1, 5
#define ZIP_HIGH 2, 6, 3, 7
#endif

/* One head: R pairs from element `at`. */
SIMD void rotate_halves(void *x, enum dtype t, int64_t at, int64_t R, const float *cos,
                        const float *sin, float direction) {
    vf sign = vf_set(direction);
    VF_FOR(i, 0, R, {
        vf c = vf_load_n(cos + i, lanes), s = vf_load_n(sin + i, lanes) * sign;
        vf x1 = vf_load_as(x, t, at + i, lanes), x2 = vf_load_as(x, t, at + R + i, lanes);
        vf_store_as(x, t, at + i, vf_fma(x1, c, -(x2 * s)), lanes);
        vf_store_as(x, t, at + R + i, vf_fma(x2, c, x1 * s), lanes);
    });
}

SIMD void rotate_interleaved(void *x, enum dtype t, int64_t at, int64_t R, const float *cos,
                             const float *sin, float direction) {
    vf sign = vf_set(direction);
    VF_FOR(i, 0, R, {
        vf c = vf_load_n(cos + i, lanes), s = vf_load_n(sin + i, lanes) * sign;
        int first = 2 * lanes < VF_WIDTH ? 2 * lanes : VF_WIDTH, second = 2 * lanes - first;
        vf a = vf_load_as(x, t, at + 2 * i, first);
        vf b = vf_load_as(x, t, at + 2 * i + first, second);
        vf x1 = __builtin_shufflevector(a, b, EVEN), x2 = __builtin_shufflevector(a, b, ODD);
        vf y1 = vf_fma(x1, c, -(x2 * s)), y2 = vf_fma(x2, c, x1 * s);
        vf_store_as(x, t, at + 2 * i, __builtin_shufflevector(y1, y2, ZIP_LOW), first);
        vf_store_as(x, t, at + 2 * i + first, __builtin_shufflevector(y1, y2, ZIP_HIGH), second);
    });
}

static void rope_tokens(void *arg, int64_t begin, int64_t end, int worker) {
    (void)worker;
    const struct rope *p = arg;
    int64_t H = p->x.shape[1], R = p->cos.shape[1];
    FOR_ACT(t, p->x.dtype, {
        for (int64_t n = begin; n < end; n++) {
            int64_t position = ((const int32_t *)p->positions.data)[n];
            const float *cos = (const float *)p->cos.data + position * R;
            const float *sin = (const float *)p->sin.data + position * R;
            for (int64_t h = 0; h < H; h++) {
                int64_t at = n * p->x.stride[0] + h * p->x.stride[1];
                if (p->interleaved)
                    rotate_interleaved(p->x.data, t, at, R, cos, sin, p->direction);
                else
                    rotate_halves(p->x.data, t, at, R, cos, sin, p->direction);
            }
        }
    });
}

static tril_status rope_run(const char *name, const struct tensor *a, const void *params,
                            float direction, struct tril_error *err) {
    tril_status st = TRIL_OK;
    const struct rope_params *p = params;
    struct rope r = {a[0], a[1], a[2], a[3], p->interleaved, direction};
    int64_t N = r.x.shape[0], ignored;
    for (int64_t n = 0; n < N; n++)
        TRY(ref_index(name, "positions", &r.positions, n, r.cos.shape[0], &ignored, err));
    int64_t bytes = 4 * r.cos.shape[1] * r.x.shape[1] * (int64_t)dtype_size(r.x.dtype);
    parallel_for(N, chunk_items(N, bytes), rope_tokens, &r);
done:
    return st;
}

static tril_status rope_forward_kernel(struct op_context *ctx, const struct tensor *a,
                                       const void *params, struct tril_error *err) {
    (void)ctx;
    return rope_run("rope_forward", a, params, 1, err);
}
static tril_status rope_backward_kernel(struct op_context *ctx, const struct tensor *a,
                                        const void *params, struct tril_error *err) {
    (void)ctx;
    return rope_run("rope_backward", a, params, -1, err);
}

void LEVEL(register_rope)(struct backend *b) {
    b->table[OP_ROPE_FORWARD] = rope_forward_kernel;
    b->table[OP_ROPE_BACKWARD] = rope_backward_kernel;
}
