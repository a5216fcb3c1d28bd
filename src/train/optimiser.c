/* Global-norm clipping and AdamW: the arena's decayed rows first, then the rest.
 *
 * Offloaded moments are mapped into the device's address space and read and written by the kernel
 * itself, 16 bytes a thread: 8 bytes a parameter cross the bus each way, at once. PCIe 5 carries 55
 * GB/s each way with 2 microseconds' latency, which 110 KB under way hide; a GPU's threads ask for
 * megabytes. So copies through slabs on the device would not be faster (the bus is the bound: 0.15
 * ms a million parameters), would take memory for the slabs, and events to order them. Nothing
 * else can run meanwhile: the update needs the norm of all gradients, and the next step the
 * update. */
#include "train/optimiser.h"

#include <math.h>

static tril_status create(struct optimiser *o, struct model *m, const struct adamw_params *params,
                          float clip, bool offloaded, struct tril_error *err) {
    const struct backend *b = m->ctx->backend;
    int64_t bytes = m->table.elements * (int64_t)sizeof(float);
    tril_status st = TRIL_OK;
    if (offloaded && !b->host_alloc)
        return error_set(err, TRIL_ERR_UNSUPPORTED,
                         "the optimiser's moments cannot be offloaded from %s to the host's "
                         "memory: that is where they are",
                         b->name);
    *o = (struct optimiser){
        .model = m, .adamw = *params, .clip = clip, .scaling.value = 1, .offloaded = offloaded};
    tril_status (*const alloc)(void **, int64_t, bool, const char *, struct tril_error *) =
        offloaded ? b->host_alloc : b->alloc;
    TRY(alloc((void **)&o->mean, bytes, true, "the optimiser's first moments", err));
    TRY(alloc((void **)&o->square, bytes, true, "the optimiser's second moments", err));
    TRY(b->alloc((void **)&o->hyper, HYPER_COUNT * sizeof(float), true, "the step's scalars", err));
    TRY(b->alloc((void **)&o->total, sizeof(double), true, "the gradient norm", err));
done:
    if (st != TRIL_OK)
        optimiser_free(o);
    return st;
}

tril_status optimiser_create(struct optimiser *o, struct model *m,
                             const struct adamw_params *params, float clip,
                             struct tril_error *err) {
    return create(o, m, params, clip, false, err);
}

tril_status optimiser_create_offloaded(struct optimiser *o, struct model *m,
                                       const struct adamw_params *params, float clip,
                                       struct tril_error *err) {
    return create(o, m, params, clip, true, err);
}

void optimiser_free(struct optimiser *o) {
    if (!o->model)
        return;
    const struct backend *b = o->model->ctx->backend;
    op_replay_free(o->model->ctx, &o->replay);
    (o->offloaded ? b->host_release : b->release)(o->mean);
    (o->offloaded ? b->host_release : b->release)(o->square);
    b->release(o->hyper);
    b->release(o->total);
    *o = (struct optimiser){0};
}

/* AdamW over elements [begin, begin + count) of the arenas. */
static tril_status update_range(struct optimiser *o, int64_t begin, int64_t count, bool decayed,
                                struct tril_error *err) {
    struct model *m = o->model;
    struct adamw_params params = o->adamw;
    struct tensor copy = tensor_none();
    if (count == 0)
        return TRIL_OK;
    if (!decayed)
        params.decay = 0;
    /* Only matrices have compute copies, and only matrices are decayed. */
    if (decayed && m->compute != (void *)m->master)
        copy =
            tensor_1d((char *)m->compute + begin * (int64_t)dtype_size(m->dtype), m->dtype, count);
    return adamw(m->ctx, tensor_1d(m->master + begin, DT_F32, count),
                 tensor_1d(m->gradient + begin, DT_F32, count),
                 tensor_1d(o->mean + begin, DT_F32, count),
                 tensor_1d(o->square + begin, DT_F32, count), copy,
                 tensor_1d(o->hyper, DT_F32, HYPER_COUNT), params, err);
}

static tril_status step_body(void *arg, struct tril_error *err) {
    struct optimiser *o = arg;
    struct model *m = o->model;
    struct op_context *ctx = m->ctx;
    int64_t n = m->table.elements, decayed = m->table.decay_elements;
    tril_status st = TRIL_OK;
    TRY(ctx->backend->fill_zero(ctx, o->total, sizeof(double), err));
    TRY(sum_squares(ctx, tensor_1d(m->gradient, DT_F32, n), tensor_1d(o->total, DT_F64, 1), err));
    TRY(clip_factor(ctx, tensor_1d(o->total, DT_F64, 1), tensor_1d(o->hyper, DT_F32, HYPER_COUNT),
                    o->clip, (float)(1 / o->scaling.value), err));
    TRY(update_range(o, 0, decayed, true, err));
    TRY(update_range(o, decayed, n - decayed, false, err));
    TRY(model_refresh(m, err));
done:
    return st;
}

static void rescale(struct loss_scaling *s, bool applied) {
    enum { DOUBLED_AFTER = 2000 };
    if (!s->on)
        return;
    s->good = applied ? s->good + 1 : 0;
    s->skipped += !applied;
    if (!applied) {
        s->value /= 2;
    } else if (s->good == DOUBLED_AFTER) {
        s->good = 0;
        s->value *= 2;
    }
}

tril_status optimiser_step(struct optimiser *o, int64_t t, double lr, double *grad_norm,
                           bool *applied, struct tril_error *err) {
    struct model *m = o->model;
    struct op_context *ctx = m->ctx;
    const struct backend *b = ctx->backend;
    float hyper[HYPER_COUNT] = {0};
    tril_status st = TRIL_OK;
    hyper[HYPER_LR] = (float)lr;
    hyper[HYPER_CORRECTION1] = (float)(1 / (1 - pow(o->adamw.beta1, (double)t)));
    hyper[HYPER_CORRECTION2] = (float)(1 / (1 - pow(o->adamw.beta2, (double)t)));
    TRY(b->upload(ctx, o->hyper, hyper, sizeof hyper, err));
    /* All else that the host decides is fixed. */
    TRY(op_replay_run(ctx, &o->replay,
                      op_replay_key(OP_REPLAY_KEY, &o->scaling.value, sizeof o->scaling.value),
                      step_body, o, err));
    TRY(b->download(ctx, hyper, o->hyper, sizeof hyper, err));
    *grad_norm = hyper[HYPER_GRAD_NORM];
    *applied = hyper[HYPER_FOUND_INF] == 0;
    rescale(&o->scaling, *applied);
done:
    return st;
}
