/* Attention from C, with nothing else of tril: a batch of two sequences, four query heads over two
 * key/value heads, forward and backward on the caller's own memory.
 *
 *   cc -o attention attention.c $(pkg-config --cflags --libs --static tril) && ./attention
 */
#include <stdio.h>
#include <stdlib.h>
#include <tril/attention.h>

enum { B = 2, H = 4, HK = 2, T = 64, D = 32 };

static float *numbers(size_t n, unsigned seed) {
    float *x = malloc(n * sizeof *x);
    for (size_t i = 0; x && i < n; i++) {
        seed = seed * 1664525u + 1013904223u;
        x[i] = (float)(seed >> 8) / (1 << 23) - 1;
    }
    return x;
}

int main(void) {
    const size_t of_q = (size_t)B * H * T * D, of_k = (size_t)B * HK * T * D;
    struct tril_error err = {0};
    size_t forward, backward;

    /* What is computed: [B, H, T, D], dense; a window of 16 tokens and the first two. */
    struct tril_attention a = tril_attention_defaults(B, H, T, D);
    a.kv_heads = HK;
    a.visible = "causal+window:16+sinks:2";

    /* Where: inputs, outputs, and as much scratch as it says it needs. */
    float *sink = calloc(H, sizeof *sink), *dsink = calloc(H, sizeof *dsink);
    struct tril_attention_buffers b = {.q = numbers(of_q, 1),
                                       .k = numbers(of_k, 2),
                                       .v = numbers(of_k, 3),
                                       .sink = sink,
                                       .o = numbers(of_q, 0),
                                       .lse = numbers((size_t)B * H * T, 0),
                                       .dout = numbers(of_q, 4),
                                       .dq = numbers(of_q, 0),
                                       .dk = numbers(of_k, 0),
                                       .dv = numbers(of_k, 0),
                                       .dsink = dsink};
    if (tril_attention_scratch(&a, &forward, &backward, &err) != TRIL_OK)
        goto failed;
    void *scratch = malloc(forward > backward ? forward : backward);

    if (tril_attention_forward(&a, &b, scratch, forward, &err) != TRIL_OK)
        goto failed;
    if (tril_attention_backward(&a, &b, scratch, backward, &err) != TRIL_OK)
        goto failed;
    printf("scratch: %zu bytes forward, %zu backward\n", forward, backward);
    printf("o[0] = %.6f, lse[0] = %.6f, dq[0] = %.6f\n", ((float *)b.o)[0], b.lse[0],
           ((float *)b.dq)[0]);

    /* A step along a sink's gradient changes sum(o do) by as much as it says. */
    double before = 0, after = 0, step = 1e-2;
    for (size_t i = 0; i < of_q; i++)
        before += (double)((float *)b.o)[i] * ((const float *)b.dout)[i];
    sink[1] += (float)step;
    if (tril_attention_forward(&a, &b, scratch, forward, &err) != TRIL_OK)
        goto failed;
    for (size_t i = 0; i < of_q; i++)
        after += (double)((float *)b.o)[i] * ((const float *)b.dout)[i];
    printf("dsink[1] = %.4f, by difference %.4f\n", dsink[1], (after - before) / step);

    /* A description that makes no sense is an error with a sentence, not a crash. */
    a.kv_heads = 3;
    if (tril_attention_forward(&a, &b, scratch, forward, &err) != TRIL_ERR_ARGUMENT)
        return 1;
    printf("refused: %s\n", err.message);
    return 0;

failed:
    fprintf(stderr, "%s\n", err.message);
    return 1;
}
