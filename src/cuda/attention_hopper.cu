/* Which calls Hopper's attention takes. */
#include "cuda/attention_hopper.cuh"

/* Whether this program holds the kernels' code for the GPU (compiled for others, they are empty):
 * then this kernel, never run, has shared memory. */
#ifndef TRIL_CUDA_EMULATED
__global__ void attention_hopper_probe(int *out) {
#ifdef HOPPER_CODE
    __shared__ int mark[256];
    mark[threadIdx.x] = out[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = mark[255 - threadIdx.x];
#endif
}
#endif

static bool code_is_there() {
#ifdef TRIL_CUDA_EMULATED
    return true;
#else
    static bool there = [] {
        struct cudaFuncAttributes a;
        if (cudaFuncGetAttributes(&a, attention_hopper_probe) == cudaSuccess)
            return a.sharedSizeBytes >= 256 * sizeof(int);
        (void)cudaGetLastError();
        return false;
    }();
    return there;
#endif
}

bool attention_hopper_takes(const struct op_context *ctx, const struct tensor *args,
                            const struct attention_params *p, const int *which, int count) {
    const struct tensor *q = &args[F_Q];
    if (cuda_state_of(ctx)->capability != 90 || !code_is_there())
        return false;
    if ((q->dtype != DT_BF16 && q->dtype != DT_F16) || (q->shape[2] != 64 && q->shape[2] != 128))
        return false;
    for (int i = 0; i < count; i++)
        if (args[which[i]].dtype != q->dtype || !rows_packable(args[which[i]], 8))
            return false;
    if (q->shape[0] < 1 || args[F_K].shape[0] < 1 || q->shape[0] > REACH_ALL / 2 ||
        args[F_K].shape[0] > REACH_ALL / 2 || args[F_START].shape[0] < 1)
        return false;
    if (!(p->scale > 0) || p->softcap != 0 || p->dropout != 0 || (p->max_q > 0 && p->max_q <= 16))
        return false;
    if (!p->rules)
        return true;
    const struct visible_rule *rule = &p->rules[0];
    return p->rule_count == 1 &&
           (rule->parts == 0 || (rule->parts == 1 && rule->part[0].kind == VISIBLE_WINDOW));
}

extern "C" bool attention_hopper_takes_forward(const struct op_context *ctx,
                                               const struct tensor *args,
                                               const struct attention_params *p) {
    static const int which[] = {F_Q, F_K, F_V, F_O};
    return !args[F_PAGES].data && !args[F_SLOPES].data && !args[F_BIAS].data &&
           !args[F_SINK].data && !args[F_K_SCALE].data &&
           attention_hopper_takes(ctx, args, p, which, 4);
}

extern "C" bool attention_hopper_takes_backward(const struct op_context *ctx,
                                                const struct tensor *args,
                                                const struct attention_params *p) {
    static const int which[] = {B_Q, B_K, B_V, B_O, B_DO, B_DQ, B_DK, B_DV};
    return !args[B_SLOPES].data && !args[B_BIAS].data && !args[B_SINK].data &&
           attention_hopper_takes(ctx, args, p, which, 8);
}

tril_status attention_hopper_no_map(const char *name, struct tril_error *err) {
    return error_set(err, TRIL_ERR_INTERNAL,
                     "%s: the GPU's driver cannot describe the tensors for bulk copies", name);
}
