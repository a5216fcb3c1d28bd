/* tril/lab.h: the lab on the CPU's backend or a device's. */
#include "tril/lab.h"

#include "api/device.h"
#include "base/threads.h"
#include "lab/lab.h"

bool tril_lab_get(int index, struct tril_lab_experiment *out) {
    const struct lab_experiment *e = lab_at(index);
    if (e)
        *out = e->about;
    return e != NULL;
}

tril_status tril_lab_run(const struct tril_lab_options *o, char **json, struct tril_error *err) {
    struct op_context ctx = {0};
    tril_status st = TRIL_OK;
    threads_set(o->threads);
    TRY(device_open(&ctx, o->device, err));
    struct lab_environment env = {.ctx = &ctx,
                                  .isa = device_name(&ctx),
                                  .threads = threads_count(),
                                  .peak_flops = device_peak_flops};
    TRY(lab_run(&env, o, json, err));
done:
    op_context_free(&ctx);
    return st;
}

tril_status tril_lab_report(const char *out, int *count, struct tril_error *err) {
    return lab_report(out ? out : "lab", count, err);
}
