/* See simd_arrays.h. */
#include "cpu/levels/simd_arrays.h"

#include "cpu/kernels/simd.h"

#define MAP(name, from, load, to, store, f)                                                        \
    SIMD void name##_lanes(const from *x, to *y, int n) {                                          \
        store(y, f(load(x, n)), n);                                                                \
    }                                                                                              \
    static void name##_array(const from *x, to *y, int64_t n) {                                    \
        int64_t i = 0;                                                                             \
        for (; i + VF_WIDTH <= n; i += VF_WIDTH)                                                   \
            name##_lanes(x + i, y + i, VF_WIDTH);                                                  \
        if (i < n)                                                                                 \
            name##_lanes(x + i, y + i, (int)(n - i));                                              \
    }
#define MAP_F32(name) MAP(name, float, vf_load_n, float, vf_store_n, vf_##name)
#define SAME(x) (x)

MAP_F32(exp)
MAP_F32(exp2)
MAP_F32(sigmoid)
MAP_F32(tanh)
MAP_F32(erf)
MAP_F32(normal_cdf)
MAP_F32(sqrt)
MAP_F32(round_bf16)
MAP(from_bf16, uint16_t, vf_load_bf16_n, float, vf_store_n, SAME)
MAP(to_bf16, float, vf_load_n, uint16_t, vf_store_bf16_n, SAME)
MAP(from_f16, uint16_t, vf_load_f16_n, float, vf_store_n, SAME)
MAP(to_f16, float, vf_load_n, uint16_t, vf_store_f16_n, SAME)

static void max_lanes2(const float *x, const float *y, float *z) {
    vf_store(z, vf_max(vf_load(x), vf_load(y)));
}
static void min_lanes2(const float *x, const float *y, float *z) {
    vf_store(z, vf_min(vf_load(x), vf_load(y)));
}
static void copysign_lanes2(const float *x, const float *y, float *z) {
    vf_store(z, vf_copysign(vf_load(x), vf_load(y)));
}
static float sum_array(const float *x) {
    return vf_sum(vf_load(x));
}
static float max_array(const float *x) {
    return vf_max_lanes(vf_load(x));
}

const struct simd_arrays LEVEL(simd_arrays) = {
    .width = VF_WIDTH,
    .exp = exp_array,
    .exp2 = exp2_array,
    .sigmoid = sigmoid_array,
    .tanh = tanh_array,
    .erf = erf_array,
    .normal_cdf = normal_cdf_array,
    .sqrt = sqrt_array,
    .round_bf16 = round_bf16_array,
    .from_bf16 = from_bf16_array,
    .to_bf16 = to_bf16_array,
    .from_f16 = from_f16_array,
    .to_f16 = to_f16_array,
    .max = max_lanes2,
    .min = min_lanes2,
    .copysign = copysign_lanes2,
    .sum = sum_array,
    .max_lanes = max_array,
};
