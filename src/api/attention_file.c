/* tril attention: tensors out of one safetensors file, through the operation, into another. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "api/attention.h"
#include "base/file.h"
#include "base/memory.h"
#include "base/system.h"
#include "formats/safetensors.h"

static const char *const implementations[] = {"flash", "fused", "materialised", "reference",
                                              "linear"};

tril_status attention_implementation_parse(const char *name,
                                           enum tril_attention_implementation *out,
                                           struct tril_error *err) {
    for (int i = 0; i < 5; i++)
        if (!name || strcmp(name, implementations[i]) == 0) {
            *out = (enum tril_attention_implementation)i;
            return TRIL_OK;
        }
    return error_set(err, TRIL_ERR_ARGUMENT,
                     "there is no implementation '%.40s': flash, fused, materialised, reference or "
                     "linear",
                     name);
}

/* ------------------------------------------------------------------ what is read */

struct job {
    const struct tril_attention_file *f;
    struct safetensors *in;
    struct tril_attention a;
    struct tril_attention_buffers b;
    enum dtype dtype;
    void *memory[20]; /* whatever was allocated */
    int allocated;
    float *p;
};

static tril_status job_alloc(struct job *j, void **out, size_t count, size_t size, const char *what,
                             struct tril_error *err) {
    size_t bytes;
    if (!size_mul(count, size, &bytes))
        return error_set(err, TRIL_ERR_MEMORY, "the size of %s overflows", what);
    tril_status st = mem_alloc(out, bytes, what, err);
    if (st == TRIL_OK)
        j->memory[j->allocated++] = *out;
    return st;
}

static bool is_float(enum dtype t) {
    return t == DT_F32 || t == DT_BF16 || t == DT_F16 || t == DT_F64;
}

/* "[2, 8, 128, 64]" */
static const char *print_shape(const struct st_tensor *t, char out[96]) {
    size_t used = (size_t)snprintf(out, 96, "[");
    for (int i = 0; i < t->rank && used < 90; i++)
        used += (size_t)snprintf(out + used, 96 - used, "%s%lld", i ? ", " : "",
                                 (long long)t->shape[i]);
    snprintf(out + (used < 94 ? used : 94), used < 94 ? 96 - used : 2, "]");
    return out;
}

/* The float tensor `name` with `rank` dimensions; NULL when it is missing or wrong (then *st). */
static const struct st_tensor *find(const struct job *j, const char *name, int rank,
                                    const char *shape, bool optional, tril_status *st,
                                    struct tril_error *err) {
    const struct st_tensor *t = safetensors_find(j->in, name);
    char has[96];
    if (!t && !optional)
        *st = error_set(err, TRIL_ERR_FORMAT, "%s has no tensor %s; it needs %s %s", j->f->in, name,
                        name, shape);
    if (t && (t->rank != rank || !is_float(t->dtype))) {
        *st = error_set(err, TRIL_ERR_FORMAT,
                        "%s: tensor %s is %s %s; it must be %s of fp32, bf16, fp16 or fp64",
                        j->f->in, name, dtype_name(t->dtype), print_shape(t, has), shape);
        return NULL;
    }
    return t;
}

static tril_status expect(const struct job *j, const struct st_tensor *t, int rank,
                          const int64_t *shape, const char *why, struct tril_error *err) {
    char has[96], wants[96];
    struct st_tensor wanted = {.rank = rank};
    bool same = t->rank == rank;
    for (int i = 0; i < rank; i++) {
        wanted.shape[i] = shape[i];
        same = same && t->shape[i] == shape[i];
    }
    if (same)
        return TRIL_OK;
    return error_set(err, TRIL_ERR_FORMAT, "%s: tensor %s is %s, but must be %s (%s)", j->f->in,
                     t->name, print_shape(t, has), print_shape(&wanted, wants), why);
}

/* The tensor's elements as dtype `to`, aligned. */
static tril_status load(struct job *j, const struct st_tensor *t, enum dtype to, void **out,
                        struct tril_error *err) {
    size_t size = dtype_size(t->dtype), count = t->bytes / size;
    tril_status st = job_alloc(j, out, count, dtype_size(to), t->name, err);
    double piece[512]; /* (the file's bytes may be unaligned) */
    for (size_t i = 0, n; st == TRIL_OK && i < count; i += n) {
        n = count - i < 512 ? count - i : 512;
        memcpy(piece, (const char *)t->data + i * size, n * size);
        dtype_convert((char *)*out + i * dtype_size(to), to, piece, t->dtype, n);
    }
    safetensors_forget(j->in, t);
    return st;
}

/* Any numbers as bytes: 1 where they are not zero. */
static tril_status load_blocks(struct job *j, const struct st_tensor *t, uint8_t **out,
                               struct tril_error *err) {
    size_t size = dtype_size(t->dtype), count = t->bytes / size;
    void *memory;
    tril_status st = job_alloc(j, &memory, count, 1, t->name, err);
    if (st != TRIL_OK)
        return st;
    *out = memory;
    for (size_t i = 0; i < count; i++) {
        const unsigned char *at = (const unsigned char *)t->data + i * size;
        unsigned any = 0;
        for (size_t k = 0; k < size; k++)
            any |= at[k] & (is_float(t->dtype) && k == size - 1 ? 0x7fu : 0xffu); /* -0 is 0 */
        (*out)[i] = any != 0;
    }
    return TRIL_OK;
}

static tril_status read_main(struct job *j, struct tril_error *err) {
    const struct tril_attention_file *f = j->f;
    struct tril_attention *a = &j->a;
    tril_status st = TRIL_OK;
    const struct st_tensor *q = find(j, "q", 4, "[B, H, T, d]", false, &st, err);
    const struct st_tensor *k =
        st == TRIL_OK ? find(j, "k", 4, "[B, Hk, Tk, d]", false, &st, err) : NULL;
    const struct st_tensor *v =
        st == TRIL_OK ? find(j, "v", 4, "[B, Hk, Tk, d]", false, &st, err) : NULL;
    if (st != TRIL_OK)
        return st;
    TRY(expect(j, k, 4, (int64_t[]){q->shape[0], k->shape[1], k->shape[2], q->shape[3]},
               "batch and width are those of q", err));
    TRY(expect(j, v, 4, k->shape, "the shape of k", err));
    *a = tril_attention_defaults(q->shape[0], q->shape[1], q->shape[2], q->shape[3]);
    a->kv_heads = k->shape[1];
    a->keys = k->shape[2];
    j->dtype = q->dtype == DT_F64 ? DT_F32 : q->dtype;
    if (f->dtype &&
        (!dtype_parse(f->dtype, &j->dtype) || !is_float(j->dtype) || j->dtype == DT_F64)) {
        st = error_set(err, TRIL_ERR_ARGUMENT, "the dtype is fp32, bf16 or fp16, not '%.40s'",
                       f->dtype);
        goto done;
    }
    a->dtype = j->dtype == DT_F32 ? TRIL_FP32 : j->dtype == DT_BF16 ? TRIL_BF16 : TRIL_FP16;
    TRY(attention_implementation_parse(f->implementation, &a->implementation, err));
    if (!isnan(f->scale))
        a->scale = f->scale;
    a->softcap = f->softcap;
    a->dropout = f->dropout;
    a->seed = f->seed;
    a->threads = f->threads;
    a->device = f->device;
    if (f->block_q || f->block_k) {
        a->block_q = f->block_q;
        a->block_k = f->block_k;
        a->tile_q = f->block_q;
        a->tile_k = f->block_k;
    }
    TRY(attention_check(a, err)); /* before anything is allocated by these sizes */
    TRY(load(j, q, j->dtype, (void **)&j->b.q, err));
    TRY(load(j, k, j->dtype, (void **)&j->b.k, err));
    TRY(load(j, v, j->dtype, (void **)&j->b.v, err));
done:
    return st;
}

/* Everything but q, k, v. */
static tril_status read_rest(struct job *j, struct tril_error *err) {
    const struct tril_attention_file *f = j->f;
    struct tril_attention *a = &j->a;
    tril_status st = TRIL_OK;
    const struct st_tensor *t;
    void *memory;
    if (f->gradients) {
        t = find(j, "do", 4, "[B, H, T, d], the gradient of o", false, &st, err);
        if (st != TRIL_OK)
            goto done;
        TRY(expect(j, t, 4, (int64_t[]){a->batch, a->heads, a->queries, a->width}, "the shape of q",
                   err));
        TRY(load(j, t, j->dtype, (void **)&j->b.dout, err));
    }
    t = find(j, "bias", 3, "[1 or H, T, Tk]", true, &st, err);
    if (st != TRIL_OK)
        goto done;
    if (t) {
        int64_t heads = t->shape[0] == 1 ? 1 : a->heads;
        TRY(expect(j, t, 3, (int64_t[]){heads, a->queries, a->keys},
                   "1 or all heads, queries, keys", err));
        a->bias_heads = heads;
        a->bias_dtype = t->dtype == DT_BF16 ? TRIL_BF16 : TRIL_FP32;
        TRY(load(j, t, t->dtype == DT_BF16 ? DT_BF16 : DT_F32, (void **)&j->b.bias, err));
    }
    t = find(j, "sink", 1, "[H]", true, &st, err);
    if (st != TRIL_OK)
        goto done;
    if (t) {
        TRY(expect(j, t, 1, (int64_t[]){a->heads}, "one value a head", err));
        TRY(load(j, t, DT_F32, (void **)&j->b.sink, err));
    }
    if (f->alibi) {
        TRY(job_alloc(j, &memory, (size_t)a->heads, 4, "the slopes", err));
        tril_attention_alibi(a->heads, memory);
        j->b.slopes = memory;
    }
    if (a->visible && strstr(a->visible, "blocks")) {
        uint8_t *blocks;
        t = safetensors_find(j->in, "blocks");
        if (!t) {
            st = error_set(err, TRIL_ERR_FORMAT,
                           "%s has no tensor blocks, which the rule 'blocks' needs", f->in);
            goto done;
        }
        if (a->block_q < 1 || a->block_k < 1) {
            st = error_set(err, TRIL_ERR_ARGUMENT, "block sizes are at least 1, not %lld, %lld",
                           (long long)a->block_q, (long long)a->block_k);
            goto done;
        }
        TRY(expect(j, t, 2,
                   (int64_t[]){(a->queries + a->block_q - 1) / a->block_q,
                               (a->keys + a->block_k - 1) / a->block_k},
                   "one for each block of queries and keys; --block says their sizes", err));
        TRY(load_blocks(j, t, &blocks, err));
        a->blocks = blocks;
    }
done:
    return st;
}

/* ------------------------------------------------------------------ what is written */

static tril_status allocate_outputs(struct job *j, struct tril_error *err) {
    const struct tril_attention *a = &j->a;
    size_t size = dtype_size(j->dtype), rows = (size_t)(a->batch * a->heads * a->queries);
    size_t of_q = rows * (size_t)a->width;
    size_t of_k = (size_t)(a->batch * a->kv_heads * a->keys * a->width), cells;
    tril_status st = TRIL_OK;
    TRY(job_alloc(j, &j->b.o, of_q, size, "o", err));
    if (a->implementation != TRIL_ATTENTION_LINEAR)
        TRY(job_alloc(j, (void **)&j->b.lse, rows, 4, "lse", err));
    if (j->f->probabilities) {
        if (!size_mul(rows, (size_t)a->keys, &cells))
            cells = SIZE_MAX / 4;
        TRY(job_alloc(j, (void **)&j->p, cells, 4, "the probabilities", err));
    }
    if (!j->f->gradients)
        goto done;
    TRY(job_alloc(j, &j->b.dq, of_q, size, "dq", err));
    TRY(job_alloc(j, &j->b.dk, of_k, size, "dk", err));
    TRY(job_alloc(j, &j->b.dv, of_k, size, "dv", err));
    if (j->b.bias)
        TRY(job_alloc(j, (void **)&j->b.dbias, (size_t)(a->bias_heads * a->queries * a->keys), 4,
                      "dbias", err));
    if (j->b.sink)
        TRY(job_alloc(j, (void **)&j->b.dsink, (size_t)a->heads, 4, "dsink", err));
done:
    return st;
}

static tril_status write_outputs(const struct job *j, struct tril_error *err) {
    const struct tril_attention *a = &j->a;
    int64_t B = a->batch, H = a->heads, T = a->queries, U = a->keys, d = a->width;
    const struct {
        const void *data;
        struct st_declare as;
    } all[] = {
        /* fp32 first: offsets must be multiples of the element's size */
        {j->b.lse, {"lse", DT_F32, 3, {B, H, T}}},
        {j->p, {"p", DT_F32, 4, {B, H, T, U}}},
        {j->b.dbias, {"dbias", DT_F32, 3, {a->bias_heads, T, U}}},
        {j->b.dsink, {"dsink", DT_F32, 1, {H}}},
        {j->b.o, {"o", j->dtype, 4, {B, H, T, d}}},
        {j->b.dq, {"dq", j->dtype, 4, {B, H, T, d}}},
        {j->b.dk, {"dk", j->dtype, 4, {B, a->kv_heads, U, d}}},
        {j->b.dv, {"dv", j->dtype, 4, {B, a->kv_heads, U, d}}},
    };
    struct st_declare declared[8];
    struct st_writer *w = NULL;
    size_t count = 0;
    tril_status st = TRIL_OK;
    for (int i = 0; i < 8; i++)
        if (all[i].data)
            declared[count++] = all[i].as;
    TRY(st_writer_open(&w, j->f->out, declared, count, NULL, 0, err));
    for (int i = 0; i < 8; i++) {
        size_t bytes = dtype_size(all[i].as.dtype);
        for (int k = 0; k < all[i].as.rank; k++)
            bytes *= (size_t)all[i].as.shape[k];
        if (all[i].data)
            TRY(st_writer_write(w, all[i].data, bytes, err));
    }
    st = st_writer_finish(w, err);
    w = NULL;
done:
    st_writer_abort(w);
    return st;
}

tril_status tril_attention_file(const struct tril_attention_file *f,
                                struct tril_attention_file_result *r, struct tril_error *err) {
    struct job j = {.f = f};
    size_t forward = 0, backward = 0;
    int64_t block_q, block_k;
    void *scratch;
    tril_status st = TRIL_OK;
    if (path_same(f->in, f->out))
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "the results cannot go to %s: it holds the tensors that are read, which "
                         "would be lost",
                         f->out);
    TRY(safetensors_open(&j.in, f->in, err));
    TRY(read_main(&j, err));
    j.a.visible = f->visible;
    TRY(read_rest(&j, err));
    if (j.a.implementation == TRIL_ATTENTION_LINEAR && f->probabilities) {
        st = error_set(err, TRIL_ERR_ARGUMENT, "linear attention has no probabilities to write");
        goto done;
    }
    TRY(attention_measure(&j.a, &forward, f->gradients ? &backward : NULL, &block_q, &block_k,
                          err));
    TRY(allocate_outputs(&j, err));
    size_t most = forward > backward ? forward : backward;
    TRY(job_alloc(&j, &scratch, most, 1, "scratch", err));
    *r = (struct tril_attention_file_result){.batch = j.a.batch,
                                             .heads = j.a.heads,
                                             .kv_heads = j.a.kv_heads,
                                             .queries = j.a.queries,
                                             .keys = j.a.keys,
                                             .width = j.a.width,
                                             .dtype = dtype_name(j.dtype),
                                             .scratch_bytes = (double)most,
                                             .block_q = block_q,
                                             .block_k = block_k};
    double begun = clock_seconds();
    TRY(tril_attention_forward(&j.a, &j.b, scratch, most, err));
    r->forward_seconds = clock_seconds() - begun;
    if (f->probabilities)
        TRY(tril_attention_probabilities(&j.a, &j.b, NULL, j.a.queries, j.p, err));
    if (f->gradients) {
        begun = clock_seconds();
        TRY(tril_attention_backward(&j.a, &j.b, scratch, most, err));
        r->backward_seconds = clock_seconds() - begun;
    }
    TRY(write_outputs(&j, err));
done:
    for (int i = 0; i < j.allocated; i++)
        mem_free(j.memory[i]);
    safetensors_close(j.in);
    return st;
}
