/* Rotary embedding in place (contracts: ops.h; formulas: src/ops/rope.c).
 *
 * A thread rotates 16 bytes of first and 16 of second halves (interleaved: 32 neighbouring bytes)
 * of every so-manieth head of one token, whose cos and sin it reads once. The rotated channels are
 * read and written once; the tables' rows, 8 R bytes a token, are shared by its heads. */
#include "cuda/device.cuh"

template <typename T, int count, bool interleaved>
__global__ void rope_kernel(rows<T> x, const int32_t *positions, const float *cosines,
                            const float *sines, int64_t N, int H, int64_t R, float direction) {
    int64_t n = (int64_t)blockIdx.x * blockDim.z + threadIdx.z;
    if (n >= N)
        return;
    int64_t table = positions[n] * R;
    for (int64_t i = (int64_t)threadIdx.x * count; i < R; i += (int64_t)blockDim.x * count) {
        float c[count], s[count];
        load_floats<count>(cosines + table + i, c);
        load_floats<count>(sines + table + i, s);
        for (int h = (int)threadIdx.y; h < H; h += (int)blockDim.y) {
            T *one = x.data + n * x.outer + h * x.inner + (interleaved ? 2 * i : i);
            T *two = one + (interleaved ? count : R);
            float v[2 * count], a[count], b[count];
            load_packed<T, count>(one, a);
            load_packed<T, count>(two, b);
#pragma unroll
            for (int k = 0; k < count; k++) { /* v: first and second of pair k at 2k and 2k + 1 */
                v[interleaved ? k : 2 * k] = a[k];
                v[interleaved ? count + k : 2 * k + 1] = b[k];
            }
#pragma unroll
            for (int k = 0; k < count; k++) {
                float sine = direction * s[k], first = v[2 * k], second = v[2 * k + 1];
                v[2 * k] = first * c[k] - second * sine;
                v[2 * k + 1] = second * c[k] + first * sine;
            }
#pragma unroll
            for (int k = 0; k < count; k++) {
                a[k] = v[interleaved ? k : 2 * k];
                b[k] = v[interleaved ? count + k : 2 * k + 1];
            }
            store_packed<T, count>(one, a);
            store_packed<T, count>(two, b);
        }
    }
}

static tril_status rope(struct op_context *ctx, const char *name, const struct tensor *args,
                        const void *params, float direction, struct tril_error *err) {
    enum { X, POSITIONS, COS, SIN };
    int64_t N = args[X].shape[0], H = args[X].shape[1], R = args[COS].shape[1];
    bool interleaved = ((const struct rope_params *)params)->interleaved;
    const float *c = (const float *)args[COS].data, *s = (const float *)args[SIN].data;
    FOR_DTYPE(args[X].dtype, T, {
        const int most = 16 / sizeof(T);
        bool packs = rows_packable(args[X], most) && R % most == 0 &&
                     ((uintptr_t)c | (uintptr_t)s) % 16 == 0;
        auto *kernel = interleaved ? packs ? rope_kernel<T, most, true> : rope_kernel<T, 1, true>
                       : packs ? rope_kernel<T, most, false>
                                   : rope_kernel<T, 1, false>;
        unsigned grid;
        dim3 block = heads_block(N, H, packs ? R / most : R, &grid);
        return cuda_launch(ctx, name, err, kernel, dim3(grid), block, 0, rows_of<T>(args[X]),
                           (const int32_t *)args[POSITIONS].data, c, s, N, (int)H, R, direction);
    });
}

OP_FN(rope_forward) {
    return rope(ctx, "rope_forward", args, params, 1.0f, err);
}

OP_FN(rope_backward) {
    return rope(ctx, "rope_backward", args, params, -1.0f, err);
}
