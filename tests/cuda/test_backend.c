/* The CUDA backend's frame, on the emulated GPU: transfers, memory that runs out, the host's
 * references in the place of kernels, and recorded steps. */
#include "support/support.h"

#include <stdlib.h>
#include <string.h>

#include "cuda/cuda.h"
#include "ops/replay.h"

static struct op_context context;
static const struct backend *gpu;

static int open_context(void **state) {
    (void)state;
    gpu = backend_cuda();
    return op_context_init(&context, gpu, NULL) != TRIL_OK;
}
static int close_context(void **state) {
    (void)state;
    op_context_free(&context);
    return 0;
}

static void test_device(void **state) {
    (void)state;
    struct cuda_device d;
    assert_int_equal(cuda_device_get(&d, NULL), TRIL_OK);
    assert_true(d.major >= 8 && d.processors > 0 && d.memory > 0 && d.free <= d.memory);
}

/* More than the ring of pinned pieces holds, and a caller who writes into the buffer at once. */
static void test_transfers(void **state) {
    (void)state;
    enum { BYTES = (19 << 20) + 13 };
    unsigned char *host = malloc(BYTES), *back = malloc(BYTES);
    void *there;
    assert_true(host && back);
    assert_int_equal(gpu->alloc(&there, BYTES, false, "a test", NULL), TRIL_OK);
    for (int i = 0; i < BYTES; i++)
        host[i] = (unsigned char)(i * 31 + i / 4099);
    memcpy(back, host, BYTES);
    assert_int_equal(gpu->upload(&context, there, host, BYTES, NULL), TRIL_OK);
    memset(host, 0, BYTES);
    assert_int_equal(gpu->download(&context, host, there, BYTES, NULL), TRIL_OK);
    assert_memory_equal(host, back, BYTES);
    assert_int_equal(gpu->fill_zero(&context, (char *)there + 1000, 77, NULL), TRIL_OK);
    assert_int_equal(gpu->download(&context, host, there, 2000, NULL), TRIL_OK);
    memset(back + 1000, 0, 77);
    assert_memory_equal(host, back, 2000);
    gpu->release(there);
    free(host);
    free(back);
}

static void test_no_memory(void **state) {
    (void)state;
    struct tril_error err = {0};
    void *p = &err;
    assert_int_equal(gpu->alloc(&p, (int64_t)1 << 44, false, "the test's tensor", &err),
                     TRIL_ERR_MEMORY);
    assert_null(p);
    assert_non_null(strstr(err.message, "the test's tensor needs"));
    assert_non_null(strstr(err.message, "smaller batch"));
    assert_int_equal(gpu->alloc(&p, -1, false, "the test's tensor", &err), TRIL_ERR_ARGUMENT);
    assert_int_equal(gpu->alloc(&p, 0, true, "nothing", &err), TRIL_OK);
    gpu->release(p);
    assert_null(op_scratch(&context, (int64_t)1 << 44));
}

/* ------------------------------------------------------------------ memory, and copies beside */

extern void emulated_streams_early(bool yes); /* tests/cuda/emulation/runtime.cpp */

static void test_memory(void **state) {
    (void)state;
    struct backend_memory before, now;
    void *a, *b, *c;
    gpu->memory_reset();
    gpu->memory(&before);
    assert_int_equal(before.device, before.device_peak);
    assert_int_equal(gpu->alloc(&a, 1000, false, "a", NULL), TRIL_OK);
    assert_int_equal(gpu->alloc(&b, 5000, true, "b", NULL), TRIL_OK);
    assert_int_equal(gpu->host_alloc(&c, 300, true, "c", NULL), TRIL_OK);
    gpu->release(b);
    gpu->memory(&now);
    assert_int_equal(now.device - before.device, 1000);
    assert_int_equal(now.device_peak - before.device, 6000);
    assert_int_equal(now.host - before.host, 300);
    gpu->host_release(c);
    gpu->release(a);
    gpu->memory_reset();
    gpu->memory(&now);
    assert_memory_equal(&now, &before, sizeof now);
}

enum { FLOATS = 64 };
static void put(float *there, float value) {
    float x[FLOATS];
    for (int i = 0; i < FLOATS; i++)
        x[i] = value;
    assert_int_equal(gpu->upload(&context, there, x, sizeof x, NULL), TRIL_OK);
}
static float get(const float *there) {
    float x[FLOATS];
    assert_int_equal(gpu->download(&context, x, there, sizeof x, NULL), TRIL_OK);
    return x[FLOATS - 1];
}

/* What is waited for has come, in whatever order the streams run; operations take pinned memory. */
static void test_copies(void **state) {
    (void)state;
    float *here, *there, *back;
    const int64_t bytes = FLOATS * sizeof(float);
    assert_int_equal(gpu->alloc((void **)&here, bytes, true, "x", NULL), TRIL_OK);
    assert_int_equal(gpu->alloc((void **)&back, bytes, true, "y", NULL), TRIL_OK);
    assert_int_equal(gpu->host_alloc((void **)&there, bytes, true, "z", NULL), TRIL_OK);
    struct tensor x = tensor_2d(here, DT_F32, 1, FLOATS), z = tensor_2d(there, DT_F32, 1, FLOATS);
    for (int early = 0; early < 2; early++) {
        emulated_streams_early(early);
        put(here, 1);
        assert_int_equal(gpu->copy_begin(&context, 0, there, here, bytes, NULL), TRIL_OK);
        assert_int_equal(gpu->copy_begin(&context, 1, back, there, bytes, NULL), TRIL_OK);
        assert_int_equal(gpu->copy_wait(&context, 1, NULL), TRIL_OK);
        assert_true(get(back) == 1 && get(there) == 1);
        put(here, -2);
        assert_int_equal(activation_forward(&context, x, z, ACT_RELU, NULL), TRIL_OK);
        assert_true(get(there) == 0);
    }
    emulated_streams_early(false);
    gpu->host_release(there);
    gpu->release(here);
    gpu->release(back);
}

/* The emulated GPU shows what forgets to wait: a late copy has not come, and takes what was written
 * meanwhile; an early one has overwritten what was still read. */
static void test_unwaited(void **state) {
    (void)state;
    float *from, *to;
    const int64_t bytes = FLOATS * sizeof(float);
    assert_int_equal(gpu->host_alloc((void **)&from, bytes, true, "x", NULL), TRIL_OK);
    assert_int_equal(gpu->alloc((void **)&to, bytes, true, "y", NULL), TRIL_OK);
    for (int early = 0; early < 2; early++) {
        emulated_streams_early(early);
        put(from, 1);
        put(to, 0);
        assert_int_equal(gpu->copy_begin(&context, 0, to, from, bytes, NULL), TRIL_OK);
        assert_true(get(to) == (float)early);
        put(from, 2);
        assert_int_equal(gpu->copy_wait(&context, 0, NULL), TRIL_OK);
        assert_true(get(to) == (early ? 1 : 2));
    }
    emulated_streams_early(false);
    gpu->host_release(from);
    gpu->release(to);
}

struct copying {
    float *from, *to, *result;
    bool forgets;
    int runs;
};
static tril_status copying_body(void *arg, struct tril_error *err) {
    struct copying *c = arg;
    tril_status st;
    struct tensor x = tensor_2d(c->to, DT_F32, 1, FLOATS);
    struct tensor y = tensor_2d(c->result, DT_F32, 1, FLOATS);
    c->runs++;
    TRY(gpu->copy_begin(&context, 1, c->to, c->from, FLOATS * sizeof(float), err));
    if (!c->forgets)
        TRY(gpu->copy_wait(&context, 1, err));
    TRY(activation_forward(&context, x, y, ACT_RELU, err));
done:
    return st;
}

/* A recording may fork and join; one that does not join is refused, and the body runs plainly. */
static void test_recorded_copies(void **state) {
    (void)state;
    const int64_t bytes = FLOATS * sizeof(float);
    for (int forgets = 0; forgets < 2; forgets++) {
        struct copying c = {.forgets = forgets};
        struct op_replay r = {0};
        assert_int_equal(gpu->host_alloc((void **)&c.from, bytes, true, "x", NULL), TRIL_OK);
        assert_int_equal(gpu->alloc((void **)&c.to, bytes, true, "y", NULL), TRIL_OK);
        assert_int_equal(gpu->alloc((void **)&c.result, bytes, true, "z", NULL), TRIL_OK);
        for (int i = 1; i < 6; i++) {
            emulated_streams_early(i % 2);
            put(c.from, (float)i);
            assert_int_equal(op_replay_run(&context, &r, 1, copying_body, &c, NULL), TRIL_OK);
            assert_true(forgets || get(c.result) == (float)i);
            if (forgets)
                assert_int_equal(gpu->copy_wait(&context, 1, NULL), TRIL_OK);
        }
        assert_int_equal(c.runs, forgets ? 6 : 2);
        op_replay_free(&context, &r);
        gpu->host_release(c.from);
        gpu->release(c.to);
        gpu->release(c.result);
    }
    emulated_streams_early(false);
}

/* ------------------------------------------------------------------ recorded steps */

enum { COUNT = 300 };
struct body {
    float *x, *y;
    enum activation kind;
    bool by_reference; /* an operation that the backend leaves to the host */
    int runs;
};

static tril_status run_body(void *arg, struct tril_error *err) {
    struct body *b = arg;
    struct tensor x = tensor_2d(b->x, DT_F32, 3, COUNT / 3);
    struct tensor y = tensor_2d(b->y, DT_F32, 3, COUNT / 3);
    b->runs++;
    context.reference = b->by_reference;
    tril_status st = activation_forward(&context, x, y, b->kind, err);
    context.reference = false;
    return st;
}

/* Runs the body once on values that begin with `first` and says whether y is right. */
static bool right(struct op_replay *r, uint64_t key, struct body *b, float first) {
    float x[COUNT], y[COUNT];
    for (int i = 0; i < COUNT; i++)
        x[i] = first + (float)i - 100;
    assert_int_equal(gpu->upload(&context, b->x, x, sizeof x, NULL), TRIL_OK);
    assert_int_equal(op_replay_run(&context, r, key, run_body, b, NULL), TRIL_OK);
    assert_int_equal(gpu->download(&context, y, b->y, sizeof y, NULL), TRIL_OK);
    for (int i = 0; i < COUNT; i++)
        if (y[i] != (x[i] > 0 ? x[i] : 0))
            return false;
    return true;
}

static void body_create(struct body *b) {
    *b = (struct body){.kind = ACT_RELU};
    assert_int_equal(gpu->alloc((void **)&b->x, COUNT * sizeof(float), true, "x", NULL), TRIL_OK);
    assert_int_equal(gpu->alloc((void **)&b->y, COUNT * sizeof(float), true, "y", NULL), TRIL_OK);
}

static void test_replay(void **state) {
    (void)state;
    struct op_replay r = {0};
    struct body b;
    body_create(&b);
    for (int i = 0; i < 6; i++)
        assert_true(right(&r, 7, &b, (float)i));
    assert_int_equal(b.runs, 2); /* run, recorded; then replayed */
    /* Scratch that moved: recorded anew. */
    assert_non_null(op_scratch(&context, context.scratch_bytes + 4096));
    assert_true(right(&r, 7, &b, 9));
    assert_int_equal(b.runs, 3);
    /* More keys than are remembered: every one is right all the same. */
    for (uint64_t key = 100; key < 100 + 3 * REPLAY_MOST; key++)
        assert_true(right(&r, 100 + key % 11, &b, (float)key));
    op_replay_free(&context, &r);
    gpu->release(b.x);
    gpu->release(b.y);
}

static void test_replay_of_references(void **state) {
    (void)state;
    struct op_replay r = {0};
    struct body b;
    body_create(&b);
    b.by_reference = true;
    int64_t before = context.host_falls;
    for (int i = 0; i < 4; i++)
        assert_true(right(&r, 7, &b, (float)i));
    assert_int_equal(b.runs, 4);
    assert_int_equal(context.host_falls - before, 4);
    op_replay_free(&context, &r);
    gpu->release(b.x);
    gpu->release(b.y);
}

/* A body that uploads is refused while it is recorded, and then simply runs. */
static tril_status uploading_body(void *arg, struct tril_error *err) {
    struct body *b = arg;
    float one = 1;
    b->runs++;
    return gpu->upload(&context, b->y, &one, sizeof one, err);
}

static void test_replay_of_transfers(void **state) {
    (void)state;
    struct op_replay r = {0};
    struct body b;
    body_create(&b);
    for (int i = 0; i < 4; i++)
        assert_int_equal(op_replay_run(&context, &r, 1, uploading_body, &b, NULL), TRIL_OK);
    assert_int_equal(b.runs, 5); /* the second time twice: recorded in vain */
    op_replay_free(&context, &r);
    gpu->release(b.x);
    gpu->release(b.y);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_device),
        cmocka_unit_test(test_transfers),
        cmocka_unit_test(test_no_memory),
        cmocka_unit_test(test_memory),
        cmocka_unit_test(test_copies),
        cmocka_unit_test(test_unwaited),
        cmocka_unit_test(test_recorded_copies),
        cmocka_unit_test(test_replay),
        cmocka_unit_test(test_replay_of_references),
        cmocka_unit_test(test_replay_of_transfers),
    };
    return cmocka_run_group_tests(tests, open_context, close_context);
}
