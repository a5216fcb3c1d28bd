/* tril/bench.h: the machine's limits, then the benchmark asked for. */
#include "tril/bench.h"

#include <string.h>

#include "api/device.h"
#include "api/source.h"
#include "base/system.h"
#include "base/threads.h"
#include "lab/bench.h"

struct bench_kind {
    const char *name;
    tril_status (*run)(const struct bench_call *, struct tril_bench_result *, struct tril_error *);
    bool reads_memory; /* in turns with the work */
};

/* The bandwidth: a short look for most, and a probe at hand while decoding. The probe's buffer
 * does not count as the work's memory: the peak is reset when it is gone, or the buffer taken off.
 */
static tril_status run(struct bench_call *c, const struct bench_kind *kind,
                       struct tril_bench_result *r, struct tril_error *err) {
    struct device_reader *reader = device_reader_open(c->ctx);
    tril_status st;
    if (!reader)
        return error_set(err, TRIL_ERR_MEMORY,
                         "no memory for reading it (1 GB); free some, or use a larger machine");
    r->bandwidth = device_reader_best(reader);
    c->read_pass = device_reader_pass;
    c->probe = reader;
    c->probe_bytes = device_reader_bytes(reader);
    if (!kind->reads_memory) {
        device_reader_close(reader);
        reader = NULL;
        memory_reset_peak();
    }
    st = kind->run(c, r, err);
    device_reader_close(reader);
    return st;
}

tril_status tril_bench(const struct tril_bench_options *o, struct tril_bench_result *r,
                       struct tril_error *err) {
    static const struct bench_kind kinds[] = {{"train", bench_train, false},
                                              {"prefill", bench_prefill, false},
                                              {"decode", bench_decode, true},
                                              {"gemm", bench_products, false}};
    struct op_context ctx = {0};
    struct model_config config;
    struct bench_call c = {.ctx = &ctx,
                           .config = &config,
                           .batch = o->batch > 0 ? o->batch : 1,
                           .steps = o->steps > 0 ? o->steps : 5,
                           .dtype = DT_BF16};
    size_t kind = 0;
    tril_status st = TRIL_OK;
    *r = (struct tril_bench_result){.threads = threads_count()};
    while (kind < 4 && strcmp(o->what, kinds[kind].name) != 0)
        kind++;
    if (kind == 4)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "there is no benchmark '%s': train, prefill, decode, gemm or attention",
                         o->what);
    TRY(device_open_as(&ctx, o->device, o->dtype, &c.dtype, err));
    TRY(cache_dtype_parse(&c.cache, o->kv_dtype, c.dtype, err));
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
    r->batch = c.batch;
    r->seq = c.seq;
    r->steps = c.steps;
    r->isa = device_name(&ctx);
    r->peak_flops = device_peak_flops(&ctx, c.dtype);
    TRY(run(&c, &kinds[kind], r, err));
    /* The machine may have been slowed by others at the first look. */
    double again = device_peak_flops(&ctx, c.dtype);
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
