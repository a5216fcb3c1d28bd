/* Backends by name, and what their machines can do: the one place that knows which were built. */
#ifndef API_DEVICE_H
#define API_DEVICE_H

#include "ops/ops.h"

/* "cpu" (NULL means it), "cuda" or "reference". Free with op_context_free. */
tril_status device_open(struct op_context *ctx, const char *name, struct tril_error *err);

/* The backend of a device, which need not be there. */
tril_status device_backend(const struct backend **out, const char *name, struct tril_error *err);

/* Opens a device to compute in a format by its name (device_dtype), or in "tf32": fp32, but for the
 * factors of matrix products, which a GPU's tensor cores take with 11 significant bits. */
tril_status device_open_as(struct op_context *ctx, const char *device, const char *dtype,
                           enum dtype *out, struct tril_error *err);

/* The format to compute in by its name; NULL leaves *out. (fp16: devices other than the CPU; a
 * model says so when it is made.) */
tril_status device_dtype(enum dtype *out, const char *name, struct tril_error *err);

/* "avx2", "NVIDIA H200": what computes. Lives as long as the process. */
const char *device_name(const struct op_context *ctx);

/* The most floating-point operations a second, measured now: the CPU's by multiply-adds in
 * registers (cpu/probe.h); a GPU's by a large matrix product. 0: it could not be measured. */
double device_peak_flops(struct op_context *ctx, enum dtype t);

/* Memory bandwidth in bytes a second: reading on the CPU, copying (bytes read and written) on a
 * GPU; passes can be repeated next to whatever they are compared with. NULL: no memory for it. */
struct device_reader;
struct device_reader *device_reader_open(struct op_context *ctx);
double device_reader_best(const struct device_reader *r);
double device_reader_pass(void *reader);
double device_reader_bytes(const struct device_reader *r); /* of the host's memory */
void device_reader_close(struct device_reader *r);

#endif
