// ctest: timeout=600
/* Every operation that has a CUDA kernel against its reference, on a real GPU (./run test --cuda);
 * skipped where there is none. The same cases run on the emulated GPU in tests/cuda. */
#include <stdio.h>

#include "support/op_backend.h"
#include "support/support.h"
#ifdef TRIL_CUDA
#include "cuda/cuda.h"
#endif

int main(void) {
#ifdef TRIL_CUDA
    return op_backend_test(backend_cuda(), true);
#else
    printf("skipped: built without CUDA (nvcc was not found)\n");
    return TEST_SKIP;
#endif
}
