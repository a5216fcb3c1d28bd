/* tril/bench.h: the machine's limits, then the benchmark asked for. */
#include "tril/bench.h"

#include <string.h>

#include "api/device.h"
#include "api/source.h"
#include "base/threads.h"
#include "cpu/cpu.h"
#include "cpu/probe.h"
#include "lab/bench.h"

tril_status tril_bench(const struct tril_bench_options *o, struct tril_bench_result *r,
                       struct tril_error *err) {
    static const struct {
        const char *name;
        tril_status (*run)(const struct bench_call *, struct tril_bench_result *,
                           struct tril_error *);
    } kinds[] = {{"train", bench_train},
                 {"prefill", bench_prefill},
                 {"decode", bench_decode},
                 {"gemm", bench_products}};
    struct op_context ctx = {0};
    struct model_config config;
    struct bench_call c = {.ctx = &ctx,
                           .config = &config,
                           .batch = o->batch > 0 ? o->batch : 1,
                           .steps = o->steps > 0 ? o->steps : 5,
                           .dtype = DT_BF16};
    size_t kind = 0;
    tril_status st = TRIL_OK;
    *r = (struct tril_bench_result){.isa = cpu_level_name(cpu_level_active()),
                                    .threads = threads_count()};
    while (kind < 4 && strcmp(o->what, kinds[kind].name) != 0)
        kind++;
    if (kind == 4)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "there is no benchmark '%s': train, prefill, decode or gemm", o->what);
    if (o->dtype && !dtype_parse(o->dtype, &c.dtype))
        return error_set(err, TRIL_ERR_ARGUMENT, "the dtype is bf16 or fp32, not '%s'", o->dtype);
    TRY(recompute_parse(&c.recompute, o->recompute, err));
    TRY(source_config(&o->source, &config, err));
    c.seq = o->seq > 0 ? o->seq : config.context < 512 ? config.context : 512;
    if (c.seq > config.context && o->source.overrides.context < 0)
        config.context = c.seq;
    if (c.batch > 1 << 20 || c.seq > 1 << 26 || c.batch * c.seq > 1 << 28 || c.steps > 1000000) {
        st = error_set(err, TRIL_ERR_ARGUMENT,
                       "--batch times --seq, or --steps, is beyond what can be measured");
        goto done;
    }
    TRY(device_open(&ctx, o->device, err));
    r->peak_flops = cpu_probe_peak_flops(c.dtype, threads_count());
    r->bandwidth = cpu_probe_bandwidth(threads_count());
    TRY(kinds[kind].run(&c, r, err));
    /* The machine may have been slowed by others at the first look. */
    double again = cpu_probe_peak_flops(c.dtype, threads_count());
    if (again > r->peak_flops) {
        r->mfu *= r->peak_flops / again;
        for (int i = 0; i < r->product_count; i++)
            r->products[i].fraction *= r->peak_flops / again;
        r->peak_flops = again;
    }
done:
    op_context_free(&ctx);
    return st;
}
