// ctest: timeout=900
/* Every operation that has a CUDA kernel against its reference: all cases of the registry, in
 * memory between guard pages, misaligned too; the same bits every time. On the emulated GPU (the
 * sources of src/cuda on the processor), or on the real one in tests/gpu. */
#include "support/support.h"

#include "cuda/cuda.h"
#include "support/op_backend.h"

int main(void) {
    return op_backend_test(backend_cuda(), false);
}
