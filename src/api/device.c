/* Backends by name. (A file of its own: the tests build it a second time, with the emulated GPU.)
 */
#include "api/device.h"

#include <string.h>

#include "cpu/cpu.h"
#ifdef TRIL_CUDA
#include "cuda/cuda.h"
#endif

tril_status device_open(struct op_context *ctx, const char *name, struct tril_error *err) {
    *ctx = (struct op_context){0};
    if (!name || strcmp(name, "cpu") == 0)
        return op_context_init(ctx, backend_cpu(), err);
    if (strcmp(name, "reference") == 0)
        return op_context_init(ctx, backend_reference(), err);
    if (strcmp(name, "cuda") != 0)
        return error_set(err, TRIL_ERR_ARGUMENT, "there is no device '%s': cpu, cuda or reference",
                         name);
#ifdef TRIL_CUDA
    return op_context_init(ctx, backend_cuda(), err);
#else
    return error_set(err, TRIL_ERR_UNSUPPORTED,
                     "this tril was built without CUDA: install the CUDA toolkit (nvcc 12.4 or "
                     "newer) and build it again, or use --device cpu");
#endif
}
