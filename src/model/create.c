/* A model's memory: arenas or rows, views of the parameters, initial values, packings. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/memory.h"
#include "base/threads.h"
#include "model/ablate.h"
#include "model/internal.h"

int model_row(const struct model *m, enum param_role role, int layer) {
    const struct param_row *r = param_find(&m->table, role, layer);
    return r ? (int)(r - m->table.rows) : -1;
}

int model_head_row(const struct model *m) {
    return model_row(m, m->config.tied ? PARAM_TOKEN_EMBEDDING : PARAM_HEAD, -1);
}

static int64_t row_elements(const struct param_row *r) {
    return r->shape[0] * r->shape[1];
}

static tril_status allocate(struct model *m, void **out, int64_t elements, enum dtype t, bool zero,
                            const char *what, struct tril_error *err) {
    int64_t bytes;
    if (__builtin_mul_overflow(elements, (int64_t)dtype_size(t), &bytes))
        return error_set(err, TRIL_ERR_MEMORY, "%s would be larger than any memory", what);
    return m->ctx->backend->alloc(out, bytes, zero, what, err);
}

/* Points weights and vectors at the parameters' memory. */
static void view_row(struct model *m, int i) {
    const struct param_row *r = &m->table.rows[i];
    if (!r->matrix) {
        m->vectors[i] = m->training
                            ? (float *)(void *)((char *)m->master +
                                                (size_t)r->offset * dtype_size(model_wide(m)))
                            : m->rows[i];
        return;
    }
    void *data =
        m->training ? (char *)m->compute + (size_t)r->offset * dtype_size(m->dtype) : m->rows[i];
    m->weights[i].value = tensor_2d(data, m->dtype, r->shape[0], r->shape[1]);
}

static tril_status parameters_allocate(struct model *m, struct tril_error *err) {
    tril_status st = TRIL_OK;
    if (m->training) {
        TRY(allocate(m, (void **)&m->master, m->table.elements, model_wide(m), true,
                     "the parameters", err));
        TRY(allocate(m, (void **)&m->gradient, m->table.elements, model_wide(m), true,
                     "the gradients", err));
        m->compute = m->master;
        if (m->dtype != model_wide(m))
            TRY(allocate(m, &m->compute, m->table.elements, m->dtype, true,
                         "the short copy of the parameters", err));
    }
    for (int i = 0; i < m->table.count; i++) {
        const struct param_row *r = &m->table.rows[i];
        if (!m->training)
            TRY(allocate(m, &m->rows[i], row_elements(r), r->matrix ? m->dtype : model_wide(m),
                         true, "the parameters", err));
        view_row(m, i);
    }
done:
    return st;
}

/* Host tables into the backend's memory, as doubles for a DT_F64 model. */
static tril_status table_upload(struct model *m, float **out, const float *host, int64_t count,
                                const char *what, struct tril_error *err) {
    tril_status st;
    enum dtype t = model_wide(m);
    void *wide = NULL;
    TRY(mem_alloc(&wide, (size_t)count * dtype_size(t), what, err));
    dtype_convert(wide, t, host, DT_F32, (size_t)count);
    TRY(allocate(m, (void **)out, count, t, false, what, err));
    TRY(m->ctx->backend->upload(m->ctx, *out, wide, count * (int64_t)dtype_size(t), err));
done:
    mem_free(wide);
    return st;
}

/* The rotary tables of mixer i, or those of an earlier mixer with the same theta. */
static tril_status rope_create(struct model *m, int i, struct tril_error *err) {
    tril_status st = TRIL_OK;
    const struct model_config *c = &m->config;
    struct mixer_tables *t = &m->mixers[i];
    const int64_t count = c->context * (c->rope_dim / 2);
    const double theta = c->mixers[i].rope_theta;
    float *host = NULL;
    for (int k = 0; k < i; k++) {
        if (m->mixers[k].rope_cos && (double)c->mixers[k].rope_theta == theta) {
            t->rope_cos = m->mixers[k].rope_cos;
            t->rope_sin = m->mixers[k].rope_sin;
            t->shared = true;
            return TRIL_OK;
        }
    }
    if (m->ctx->planning) { /* of any length */
        TRY(allocate(m, (void **)&t->rope_cos, count, model_wide(m), false, "cosines", err));
        return allocate(m, (void **)&t->rope_sin, count, model_wide(m), false, "sines", err);
    }
    TRY(mem_alloc((void **)&host, (size_t)count * 2 * sizeof *host, "the rotary tables", err));
    if (theta > 0)
        model_rope_table_plain(c, theta, c->context, host, host + count);
    else
        model_rope_table(c, c->context, host, host + count);
    TRY(table_upload(m, &t->rope_cos, host, count, "the rotary tables", err));
    TRY(table_upload(m, &t->rope_sin, host + count, count, "the rotary tables", err));
done:
    mem_free(host);
    return st;
}

int64_t model_distances(const struct model_config *c) {
    const struct mixer_config *m = model_recalls(c, MIXER_RECURRENCE);
    if (!m)
        return 0;
    return (int64_t)m->segment + m->keep;
}

/* The sinusoids of Vaswani et al. 2017, which Transformer-XL projects: row t is sin(t w_i), then
 * cos(t w_i), w_i = 10000^(-2i / D). */
static tril_status sinusoids_create(struct model *m, struct tril_error *err) {
    tril_status st = TRIL_OK;
    const int64_t rows = model_distances(&m->config), D = m->config.dim, half = D / 2;
    double *host = NULL;
    void *narrow = NULL;
    if (rows == 0)
        return TRIL_OK;
    TRY(mem_alloc_zero((void **)&host, (size_t)(rows * D) * sizeof *host, "sinusoids", err));
    TRY(mem_alloc(&narrow, (size_t)(rows * D) * dtype_size(m->dtype), "sinusoids", err));
    for (int64_t t = 0; t < rows; t++)
        for (int64_t i = 0; i < half; i++) {
            double angle = (double)t * pow(10000, -2 * (double)i / (double)D);
            host[t * D + i] = sin(angle);
            host[t * D + half + i] = cos(angle);
        }
    dtype_convert(narrow, m->dtype, host, DT_F64, (size_t)(rows * D));
    TRY(allocate(m, &m->sinusoids, rows * D, m->dtype, false, "sinusoids", err));
    TRY(m->ctx->backend->upload(m->ctx, m->sinusoids, narrow,
                                rows * D * (int64_t)dtype_size(m->dtype), err));
done:
    mem_free(narrow);
    mem_free(host);
    return st;
}

static tril_status tables_create(struct model *m, struct tril_error *err) {
    tril_status st = TRIL_OK;
    const struct model_config *c = &m->config;
    float *host = NULL;
    for (int i = 0; i < model_mixer_count(c); i++) {
        TRY(mixer_rules(&c->mixers[i], c->heads, &m->mixers[i].rules, err));
        if (c->position == POSITION_ROPE && mixer_rotates(&c->mixers[i]))
            TRY(rope_create(m, i, err));
    }
    TRY(sinusoids_create(m, err));
    if (c->position == POSITION_ALIBI) {
        TRY(mem_alloc((void **)&host, (size_t)c->heads * sizeof *host, "the ALiBi slopes", err));
        model_alibi_slopes(c->heads, host);
        TRY(table_upload(m, &m->slopes, host, c->heads, "the ALiBi slopes", err));
    }
done:
    mem_free(host);
    return st;
}

tril_status model_create(struct model **out, const struct model_config *config,
                         const struct model_options *options, struct op_context *ctx,
                         struct tril_error *err) {
    tril_status st;
    *out = NULL;
    const bool cpu = !ctx->backend->device && ctx->backend != backend_reference();
    if (options->dtype == DT_F16 && cpu)
        return error_set(err, TRIL_ERR_UNSUPPORTED,
                         "the CPU does not compute in fp16; choose bf16 or fp32, or --device cuda");
    if (options->dtype != DT_F32 && options->dtype != DT_BF16 && options->dtype != DT_F16 &&
        options->dtype != DT_F64)
        return error_set(err, TRIL_ERR_UNSUPPORTED,
                         "a model cannot compute in %s; choose fp32, bf16 or fp16",
                         dtype_name(options->dtype));
    struct model *m = calloc(1, sizeof *m);
    if (!m)
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory for a model");
    m->config = *config;
    m->ctx = ctx;
    m->dtype = options->dtype;
    m->training = options->training;
    TRY(param_table_create(&m->table, config, err));
    size_t n = (size_t)m->table.count;
    m->rows = calloc(n, sizeof *m->rows);
    m->weights = calloc(n, sizeof *m->weights);
    m->vectors = calloc(n, sizeof *m->vectors);
    m->prepared = calloc(n, sizeof *m->prepared);
    if (!m->rows || !m->weights || !m->vectors || !m->prepared)
        TRY(error_set(err, TRIL_ERR_MEMORY, "not enough memory for a model of %d tensors",
                      m->table.count));
    TRY(parameters_allocate(m, err));
    TRY(tables_create(m, err));
    *out = m;
    m = NULL;
done:
    model_free(m);
    return st;
}

void model_free(struct model *m) {
    if (!m)
        return;
    const struct backend *b = m->ctx->backend;
    for (int i = 0; i < m->table.count; i++) {
        if (m->prepared && m->prepared[i])
            b->weight_release(&m->weights[i]);
        if (m->rows)
            b->release(m->rows[i]);
    }
    if (m->compute != m->master)
        b->release(m->compute);
    b->release(m->master);
    b->release(m->gradient);
    for (int i = 0; i < MODEL_MOST_MIXERS; i++) {
        visible_set_free(&m->mixers[i].rules);
        if (!m->mixers[i].shared) {
            b->release(m->mixers[i].rope_cos);
            b->release(m->mixers[i].rope_sin);
        }
    }
    b->release(m->slopes);
    b->release(m->sinusoids);
    ablation_free(m->ablation);
    free(m->rows);
    free(m->weights);
    free(m->vectors);
    free(m->prepared);
    param_table_free(&m->table);
    free(m);
}

/* ------------------------------------------------------------------ filling and packing */

/* The address of element `begin` of a row in the master (or, for inference, the only) copy. */
static char *row_address(const struct model *m, int row, int64_t begin, enum dtype *t) {
    const struct param_row *r = &m->table.rows[row];
    *t = m->training || !r->matrix ? model_wide(m) : m->dtype;
    char *base =
        m->training ? (char *)m->master + (size_t)r->offset * dtype_size(*t) : m->rows[row];
    return base ? base + (size_t)begin * dtype_size(*t) : NULL;
}

static tril_status check_range(const struct model *m, int row, int64_t begin, int64_t count,
                               struct tril_error *err) {
    if (row < 0 || row >= m->table.count || begin < 0 || count < 0 ||
        begin > row_elements(&m->table.rows[row]) - count)
        return error_set(err, TRIL_ERR_INTERNAL,
                         "elements %lld to %lld of parameter row %d do not exist", (long long)begin,
                         (long long)(begin + count), row);
    return TRIL_OK;
}

struct conversion {
    char *to;
    const char *from;
    enum dtype to_type, from_type;
};

static void convert_chunk(void *arg, int64_t begin, int64_t end, int worker) {
    const struct conversion *c = arg;
    (void)worker;
    dtype_convert(c->to + (size_t)begin * dtype_size(c->to_type), c->to_type,
                  c->from + (size_t)begin * dtype_size(c->from_type), c->from_type,
                  (size_t)(end - begin));
}

/* Elements converted at a time on their way to the backend. */
#define STAGE ((int64_t)1 << 20)

tril_status model_row_upload(struct model *m, int row, int64_t begin, int64_t count,
                             const void *host, enum dtype t, struct tril_error *err) {
    tril_status st;
    const struct backend *b = m->ctx->backend;
    const struct param_row *r = &m->table.rows[row];
    void *stage = NULL;
    TRY(check_range(m, row, begin, count, err));
    enum dtype to;
    char *data = row_address(m, row, begin, &to);
    if (!data)
        TRY(error_set(err, TRIL_ERR_INTERNAL, "parameter row %d was already packed", row));
    int64_t size = (int64_t)dtype_size(to);
    if (t == to) {
        TRY(b->upload(m->ctx, data, host, count * size, err));
    } else {
        TRY(mem_alloc(&stage, (size_t)((count < STAGE ? count : STAGE) * size),
                      "converting parameters", err));
        for (int64_t i = 0; i < count; i += STAGE) {
            int64_t n = count - i < STAGE ? count - i : STAGE;
            struct conversion c = {stage, (const char *)host + (size_t)i * dtype_size(t), to, t};
            parallel_for(n, 1 << 15, convert_chunk, &c);
            TRY(b->upload(m->ctx, data + i * size, stage, n * size, err));
        }
    }
    if (m->compute != m->master) {
        struct tensor master = tensor_1d(data, to, count);
        struct tensor copy =
            tensor_1d((char *)m->compute + (size_t)(r->offset + begin) * dtype_size(m->dtype),
                      m->dtype, count);
        if (count)
            TRY(cast(m->ctx, master, copy, err));
    }
done:
    mem_free(stage);
    return st;
}

tril_status model_row_download(const struct model *m, int row, int64_t begin, int64_t count,
                               float *host, struct tril_error *err) {
    tril_status st;
    void *stage = NULL;
    TRY(check_range(m, row, begin, count, err));
    enum dtype t;
    char *data = row_address(m, row, begin, &t);
    if (!data)
        TRY(error_set(err, TRIL_ERR_INTERNAL, "parameter row %d exists in packed form only", row));
    int64_t bytes = count * (int64_t)dtype_size(t);
    if (t == DT_F32) {
        TRY(m->ctx->backend->download(m->ctx, host, data, bytes, err));
    } else {
        TRY(mem_alloc(&stage, (size_t)bytes, "converting parameters", err));
        TRY(m->ctx->backend->download(m->ctx, stage, data, bytes, err));
        dtype_convert(host, DT_F32, stage, t, (size_t)count);
    }
done:
    mem_free(stage);
    return st;
}

tril_status model_cast_masters(struct model *m, struct tril_error *err) {
    if (m->compute == m->master)
        return TRIL_OK;
    return cast(m->ctx, tensor_1d(m->master, DT_F32, m->table.elements),
                tensor_1d(m->compute, m->dtype, m->table.elements), err);
}

tril_status model_row_done(struct model *m, int row, struct tril_error *err) {
    tril_status st;
    const struct param_row *r = &m->table.rows[row];
    struct weight *w = &m->weights[row];
    if (!r->linear)
        return TRIL_OK;
    const struct backend *b = m->ctx->backend;
    if (m->prepared[row])
        return m->training ? b->weight_refresh(m->ctx, w, err) : TRIL_OK;
    unsigned uses = m->training ? WEIGHT_FORWARD | WEIGHT_BACKWARD : WEIGHT_FORWARD | WEIGHT_STATIC;
    /* The embedding looks rows up in the plain matrix: a tied one must stay. */
    if (r->role == PARAM_TOKEN_EMBEDDING)
        uses &= ~(unsigned)WEIGHT_STATIC;
    TRY(b->weight_prepare(m->ctx, w, uses, err));
    m->prepared[row] = true;
    if (!m->training && !w->value.data) {
        b->release(m->rows[row]);
        m->rows[row] = NULL;
    }
done:
    return st;
}

tril_status model_refresh(struct model *m, struct tril_error *err) {
    tril_status st = TRIL_OK;
    for (int i = 0; i < m->table.count; i++) {
        st = model_row_done(m, i, err);
        if (st != TRIL_OK) {
            error_prefix(err, "%s", m->table.rows[i].parts[0].name);
            break;
        }
    }
    return st;
}

/* ------------------------------------------------------------------ initial values */

struct draw {
    float *out;
    struct random_key key;
    int64_t begin;
    float std;
};

static void draw_chunk(void *arg, int64_t begin, int64_t end, int worker) {
    const struct draw *d = arg;
    (void)worker;
    random_normal_fill(&d->key, (uint64_t)(d->begin + begin), end - begin, d->out + begin);
    for (int64_t i = begin; i < end; i++)
        d->out[i] *= d->std;
}

tril_status model_init(struct model *m, uint64_t seed, struct tril_error *err) {
    tril_status st;
    float *stage = NULL;
    TRY(mem_alloc((void **)&stage, (size_t)STAGE * sizeof *stage, "initial parameters", err));
    for (int i = 0; i < m->table.count; i++) {
        const struct param_row *r = &m->table.rows[i];
        int64_t elements = row_elements(r);
        struct draw d = {.out = stage, .std = r->init_std};
        d.key = (struct random_key){seed, 0, (uint32_t)i, RANDOM_INIT};
        for (int64_t at = 0; at < elements; at += STAGE) {
            int64_t n = elements - at < STAGE ? elements - at : STAGE;
            d.begin = at;
            if (r->init == INIT_NORMAL)
                parallel_for(n, 1 << 14, draw_chunk, &d);
            else
                for (int64_t k = 0; k < n; k++)
                    stage[k] = r->init == INIT_ONE ? 1.0f : 0.0f;
            TRY(model_row_upload(m, i, at, n, stage, DT_F32, err));
        }
        TRY(model_row_done(m, i, err));
    }
done:
    mem_free(stage);
    return st;
}

/* ------------------------------------------------------------------ views */

const struct weight *param_weight(const struct model *m, enum param_role role, int layer) {
    int row = model_row(m, role, layer);
    return row < 0 ? NULL : &m->weights[row];
}

struct tensor param_vector(const struct model *m, enum param_role role, int layer) {
    int row = model_row(m, role, layer);
    return row < 0 ? tensor_none()
                   : tensor_1d(m->vectors[row], model_wide(m), m->table.rows[row].shape[0]);
}

struct tensor param_gradient(const struct model *m, enum param_role role, int layer) {
    int row = model_row(m, role, layer);
    if (row < 0 || !m->gradient)
        return tensor_none();
    const struct param_row *r = &m->table.rows[row];
    enum dtype t = model_wide(m);
    void *data = (char *)m->gradient + (size_t)r->offset * dtype_size(t);
    return r->rank == 1 ? tensor_1d(data, t, r->shape[0])
                        : tensor_2d(data, t, r->shape[0], r->shape[1]);
}
