/* Tensor maps for Hopper's bulk tensor copies: the host's side of hopper.cuh. */
#include "cuda/hopper.cuh"

typedef CUresult encode_fn(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *,
                           const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                           const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                           CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

/* The driver's function, found at run time: tril is not linked with the driver. */
static encode_fn *encoder() {
    static encode_fn *found = [] {
        void *f = nullptr;
        cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
        cudaError_t e = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000,
                                                         cudaEnableDefault, &result);
#else
        cudaError_t e =
            cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &f, cudaEnableDefault, &result);
#endif
        return (encode_fn *)(e == cudaSuccess && result == cudaDriverEntryPointSuccess ? f
                                                                                       : nullptr);
    }();
    return found;
}

bool tensor_map_make(CUtensorMap *map, const struct tensor *t, int box) {
    encode_fn *encode = encoder();
    if (!encode)
        return false;
    int64_t heads = t->shape[1], width = t->shape[2];
    /* One head or row alone may have any stride: what it would be packed. */
    cuuint64_t head = heads > 1 ? 2 * (cuuint64_t)t->stride[1] : 2 * (cuuint64_t)width;
    cuuint64_t row = t->shape[0] > 1 ? 2 * (cuuint64_t)t->stride[0] : head * (cuuint64_t)heads;
    const cuuint64_t size[3] = {(cuuint64_t)width, (cuuint64_t)heads, (cuuint64_t)t->shape[0]};
    const cuuint64_t stride[2] = {head, row};
    const cuuint32_t boxes[3] = {64, 1, (cuuint32_t)box}, step[3] = {1, 1, 1};
    return encode(map,
                  t->dtype == DT_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                      : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                  3, t->data, size, stride, boxes, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                  CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}
