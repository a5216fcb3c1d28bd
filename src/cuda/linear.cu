/* Linear layers through cuBLASLt. */
#include "cuda/linear.h"

tril_status linear_open(struct cuda_state *c, struct tril_error *err) {
    (void)c;
    (void)err;
    return TRIL_OK;
}

void linear_close(struct cuda_state *c) {
    (void)c;
}
