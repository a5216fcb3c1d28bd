/* Hopper's instructions, as tril's kernels use them, against plain loops: for test_hopper.c. Each
 * check gives the number of wrong elements. */
#include "cuda/hopper.cuh"

#include <cstdio>
#include <vector>

/* A deterministic bf16 or fp16 in about [-1, 1]. */
static float small(int i) {
    return (float)((i * 2654435761u >> 20) % 257) / 128.0f - 1.0f;
}

struct matrix { /* [rows][128] of bf16, in "device memory" */
    std::vector<__nv_bfloat16> data;
    struct tensor tensor;
    matrix(int rows, int seed) : data((size_t)rows * 128 + 8) {
        __nv_bfloat16 *p = data.data();
        while ((uintptr_t)p % 16)
            p++;
        for (int i = 0; i < rows * 128; i++)
            p[i] = __float2bfloat16_rn(small(i + seed));
        tensor = {p, DT_BF16, 3, {rows, 1, 128, 1}, {128, 128, 1, 1}};
    }
    float at(int row, int column) const {
        return row < 0 || row >= tensor.shape[0]
                   ? 0
                   : __bfloat162float(((__nv_bfloat16 *)tensor.data)[row * 128 + column]);
    }
};

/* ------------------------------------------------------------------ a copied tile's layout
 *
 * Chunk c (16 bytes) of row r of a half lies at 128 r + 16 (c xor r mod 8); rows outside are 0. */
extern "C" int hopper_check_swizzle(void) {
    const int rows = 64, begin = 30;
    matrix m(75, 1);
    int wrong = 0;
    CUtensorMap map;
    if (!tensor_map_make(&map, &m.tensor, rows))
        return 1;
    emulated_launch(dim3(1), dim3(32), 32 << 10, nullptr, "check", [&] {
        CUDA_SHARED(char, memory);
        uint64_t *full = (uint64_t *)(memory + (20 << 10));
        if (threadIdx.x == 0) {
            barrier_init(full, 1);
            barrier_arrive_expect(full, 2 * rows * 128);
            for (int half = 0; half < 2; half++)
                copy_tensor(memory + half * rows * 128, &map, full, 64 * half, 0, begin);
            wrong += memory[0] != (char)0xff; /* a copy is not there before its barrier says so */
        }
        __syncthreads();
        barrier_wait(full, 0);
        for (int row = 0; row < rows && threadIdx.x == 0; row++)
            for (int c = 0; c < 128; c++) {
                int chunk = c % 64 / 8;
                __nv_bfloat16 got;
                memcpy(&got,
                       memory + c / 64 * rows * 128 + row * 128 + 16 * (chunk ^ row % 8) +
                           c % 8 * 2,
                       2);
                wrong += __bfloat162float(got) != m.at(begin + row, c);
            }
    });
    cudaStreamSynchronize(nullptr);
    return wrong;
}

/* ------------------------------------------------------------------ descriptors
 *
 * Every layout of the PTX ISA: where element (row, k) lies, said here in another way: by core
 * matrices of 8 rows of 16 bytes, which a swizzle of n chunks rotates within 8 rows. */
extern "C" int hopper_check_descriptors(void) {
    int wrong = 0;
    emulated_launch(dim3(1), dim3(1), 64 << 10, nullptr, "check", [&] {
        const uint32_t start = 8192, leading = 4096, stride = 2048;
        static const int chunks_of[] = {1, 8, 4, 2}; /* by the layout's number */
        for (int layout = 0; layout < 4; layout++)
            for (int across = 0; across < 2; across++)
                for (int row = 0; row < 64; row++)
                    for (int k = 0; k < 16; k++) {
                        uint32_t chunks = (uint32_t)chunks_of[layout];
                        uint64_t d = start >> 4 | (uint64_t)(leading >> 4) << 16 |
                                     (uint64_t)(stride >> 4) << 32 | (uint64_t)layout << 62;
                        /* A line is `chunks` chunks of 8 elements; 8 lines are a pattern. */
                        uint32_t along = (uint32_t)(across ? row : k),
                                 down = (uint32_t)(across ? k : row);
                        uint32_t chunk = along / 8, line = down % 8, pattern;
                        if (layout == 0)
                            pattern = across ? chunk * stride + down / 8 * leading
                                             : chunk * leading + down / 8 * stride;
                        else
                            pattern = (across ? chunk / chunks * leading : 0) + down / 8 * stride;
                        uint32_t turn = layout == 1 ? line : layout == 2 ? line / 2 : line / 4;
                        uint32_t want = start + pattern + line * 16 * chunks +
                                        ((chunk % chunks) ^ (turn % chunks)) * 16 + along % 8 * 2;
                        wrong += emulated_element(d, row, k, across) != want;
                    }
    });
    cudaStreamSynchronize(nullptr);
    return wrong;
}

/* ------------------------------------------------------------------ products
 *
 * [64, 128] x [128, columns]^T from tiles as the kernels hold them, and x [128 rows, 128] across;
 * compared exactly: the values are short enough for every sum to be exact in fp32. */
template <bool across, bool registers>
static int check_product() {
    const int depth = 128, columns = 128;
    matrix a(64, 5), b(128, 17);
    int wrong = 0;
    CUtensorMap a_map, b_map;
    if (!tensor_map_make(&a_map, &a.tensor, 64) || !tensor_map_make(&b_map, &b.tensor, 128))
        return 1;
    emulated_launch(dim3(1), dim3(128), 64 << 10, nullptr, "check", [&] {
        CUDA_SHARED(char, memory);
        char *b_tile = memory + 64 * 256;
        uint64_t *full = (uint64_t *)(memory + (60 << 10));
        if (threadIdx.x == 0) {
            barrier_init(full, 1);
            barrier_arrive_expect(full, (64 + 128) * 256);
            for (int half = 0; half < 2; half++) {
                copy_tensor(memory + half * 64 * 128, &a_map, full, 64 * half, 0, 0);
                copy_tensor(b_tile + half * 128 * 128, &b_map, full, 64 * half, 0, 0);
            }
        }
        __syncthreads();
        barrier_wait(full, 0);
        int lane = threadIdx.x % 32, row = (int)threadIdx.x / 32 * 16 + lane / 4;
        float d[64];
        uint32_t f[8][4];
        for (int i = 0; i < 8; i++)
            for (int r = 0; r < 4; r++) {
                int k = 16 * i + lane % 4 * 2 + r / 2 * 8;
                f[i][r] = pack_pair<__nv_bfloat16>(a.at(row + r % 2 * 8, k),
                                                   a.at(row + r % 2 * 8, k + 1));
            }
        uint64_t am = product_matrix(memory, 0), bm = product_matrix(b_tile, 128 * 128);
        product_begin();
        for (int i = 0; i < depth / 16; i++) {
            uint64_t at_a = am + (uint64_t)((i / 4 * 64 * 128 + i % 4 * 32) >> 4);
            uint64_t at_b =
                bm + (uint64_t)(across ? i * 16 * 128 >> 4 : (i / 4 * 128 * 128 + i % 4 * 32) >> 4);
            if (registers)
                product<across>(d, f[i], at_b, i > 0, __nv_bfloat16());
            else
                product<across>(d, at_a, at_b, i > 0, __nv_bfloat16());
        }
        product_commit();
        wrong += d[0] == d[0]; /* nothing is there before the wait */
        product_wait<0>();
        for (int i = 0; i < 64; i++) {
            int at_row = row + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
            float want = 0;
            for (int k = 0; k < depth; k++)
                want += a.at(at_row, k) * (across ? b.at(k, column) : b.at(column, k));
            wrong += d[i] != want;
        }
    });
    cudaStreamSynchronize(nullptr);
    return wrong + 0 * columns;
}

extern "C" int hopper_check_shared(void) {
    return check_product<false, false>() + check_product<true, false>();
}
extern "C" int hopper_check_registers(void) {
    return check_product<false, true>() + check_product<true, true>();
}
