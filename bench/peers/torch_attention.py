"""The peer: PyTorch's scaled_dot_product_attention, forward and backward, on random tensors.

Takes the options of `tril bench attention` and prints one JSON object with the medians. Forward is
timed without gradients being recorded, backward alone, from a graph that is kept. --window N gives
the mask that PyTorch needs for a sliding window. --decode: one query a sequence against a cache.
"""
import argparse
import json
import os
import resource
import statistics
import time

import torch
import torch.nn.functional as F

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def timed(run, steps, warm=1):
    seconds = []
    for i in range(-warm, steps):
        begun = time.perf_counter()
        run(i)
        if i >= 0:
            seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds), min(seconds)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--heads", type=int, default=8)
    p.add_argument("--kv-heads", type=int)
    p.add_argument("--seq", type=int, default=1024)
    p.add_argument("--head-dim", type=int, default=64)
    p.add_argument("--dtype", default="bf16", choices=DTYPES)
    p.add_argument("--steps", type=int, default=5)
    p.add_argument("--window", type=int)
    p.add_argument("--full", action="store_true")
    p.add_argument("--forward-only", action="store_true")
    p.add_argument("--decode", action="store_true")
    p.add_argument("--cache", type=int, default=8192)
    p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    o = p.parse_args()
    torch.set_num_threads(o.threads)
    torch.manual_seed(0)
    B, H, K, T, d = o.batch, o.heads, o.kv_heads or o.heads, o.seq, o.head_dim
    t = DTYPES[o.dtype]
    rand = lambda *shape: torch.randn(*shape).to(t)
    out = {"peer": "PyTorch " + torch.__version__, "dtype": o.dtype}
    if o.decode:
        caches = max(2, -(-10**9 // (2 * B * K * o.cache * d * t.itemsize)))
        q, kv = rand(B, H, 1, d), [rand(2, B, K, o.cache, d) for _ in range(caches)]
        with torch.inference_mode():
            median, fastest = timed(
                lambda i: F.scaled_dot_product_attention(
                    q, *kv[i % caches], enable_gqa=H != K), o.steps, caches)
        out.update(forward_ms=1e3 * median, forward_ms_min=1e3 * fastest)
    else:
        q, k, v = rand(B, H, T, d), rand(B, K, T, d), rand(B, K, T, d)
        how = {"is_causal": not o.full, "enable_gqa": H != K}
        if o.window:
            i = torch.arange(T)
            far = i[:, None] - i[None, :]
            how = {"attn_mask": (far >= 0) & (far < o.window), "enable_gqa": H != K}
        with torch.inference_mode():
            median, fastest = timed(lambda i: F.scaled_dot_product_attention(q, k, v, **how), o.steps)
        out.update(forward_ms=1e3 * median, forward_ms_min=1e3 * fastest)
        if not o.forward_only:
            q, k, v = (x.requires_grad_(True) for x in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, **how)
            dy = rand(*y.shape)
            median, fastest = timed(
                lambda i: torch.autograd.grad(y, (q, k, v), dy, retain_graph=True), o.steps)
            out.update(backward_ms=1e3 * median, backward_ms_min=1e3 * fastest)
    out["peak_rss_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps(out))


if __name__ == "__main__":
    main()
