"""The peer: a GPT-2 or Llama-shaped model in plain PyTorch, trained, prefilled and decoded.

Written the way nanoGPT users would: fused scaled_dot_product_attention, fused AdamW, bf16 autocast
or fp32, optionally torch.compile. Prints one JSON object with the median step.
"""
import argparse
import json
import os
import resource
import statistics
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

PRESETS = {
    # name: layers, dim, heads, kv heads, ffn, vocab, family
    "gpt2": (12, 768, 12, 12, 3072, 50257, "gpt2"),
    "llama-110m": (12, 768, 12, 12, 2048, 32000, "llama"),
    "small": (4, 256, 4, 4, 1024, 4096, "gpt2"),
}


class Attention(nn.Module):
    def __init__(self, dim, heads, kv_heads, bias, rope):
        super().__init__()
        self.heads, self.kv_heads, self.width = heads, kv_heads, dim // heads
        self.qkv = nn.Linear(dim, (heads + 2 * kv_heads) * self.width, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)
        self.rope = rope

    def forward(self, x, cos, sin, cache):
        b, t, _ = x.shape
        h, k, d = self.heads, self.kv_heads, self.width
        q, key, v = self.qkv(x).split([h * d, k * d, k * d], dim=-1)
        q, key, v = (y.view(b, t, -1, d).transpose(1, 2) for y in (q, key, v))
        if self.rope:
            q, key = rotate(q, cos, sin), rotate(key, cos, sin)
        if cache is not None:
            key, v = cache.extend(self, key, v)
        o = F.scaled_dot_product_attention(q, key, v, is_causal=t > 1, enable_gqa=h != k)
        return self.out(o.transpose(1, 2).reshape(b, t, h * d))


def rotate(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Block(nn.Module):
    def __init__(self, dim, heads, kv_heads, ffn, family):
        super().__init__()
        gpt2 = family == "gpt2"
        norm = nn.LayerNorm if gpt2 else nn.RMSNorm
        self.norm1, self.norm2 = norm(dim, eps=1e-5), norm(dim, eps=1e-5)
        self.attention = Attention(dim, heads, kv_heads, gpt2, not gpt2)
        self.up = nn.Linear(dim, ffn if gpt2 else 2 * ffn, bias=gpt2)
        self.down = nn.Linear(ffn, dim, bias=gpt2)
        self.gpt2 = gpt2

    def forward(self, x, cos, sin, cache):
        x = x + self.attention(self.norm1(x), cos, sin, cache)
        h = self.up(self.norm2(x))
        if self.gpt2:
            h = F.gelu(h, approximate="tanh")
        else:
            gate, up = h.chunk(2, dim=-1)
            h = F.silu(gate) * up
        return x + self.down(h)


class Model(nn.Module):
    def __init__(self, layers, dim, heads, kv_heads, ffn, vocab, family, context):
        super().__init__()
        self.tokens = nn.Embedding(vocab, dim)
        self.positions = nn.Embedding(context, dim) if family == "gpt2" else None
        self.blocks = nn.ModuleList(Block(dim, heads, kv_heads, ffn, family) for _ in range(layers))
        self.norm = (nn.LayerNorm if family == "gpt2" else nn.RMSNorm)(dim, eps=1e-5)
        self.head = nn.Linear(dim, vocab, bias=False)
        if family == "gpt2":
            self.head.weight = self.tokens.weight
        half = dim // heads // 2
        angle = torch.arange(context)[:, None] / 10000 ** (torch.arange(half) / half)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, ids, targets=None, cache=None):
        start = cache.length if cache is not None else 0
        at = slice(start, start + ids.shape[1])
        x = self.tokens(ids)
        if self.positions is not None:
            x = x + self.positions.weight[at]
        for block in self.blocks:
            x = block(x, self.cos[at], self.sin[at], cache)
        if cache is not None:
            cache.length += ids.shape[1]
        x = self.norm(x)
        if targets is None:
            return self.head(x[:, -1:])
        return F.cross_entropy(self.head(x).flatten(0, 1), targets.flatten())


class Cache:
    """Preallocated keys and values, as fast decoders keep them."""

    def __init__(self, model, batch, capacity, dtype):
        self.length, self.store = 0, {}
        for block in model.blocks:
            a = block.attention
            shape = (2, batch, a.kv_heads, capacity, a.width)
            self.store[a] = torch.zeros(shape, dtype=dtype)

    def extend(self, attention, k, v):
        end = self.length + k.shape[2]
        store = self.store[attention]
        store[0, :, :, self.length : end] = k
        store[1, :, :, self.length : end] = v
        return store[0, :, :, :end], store[1, :, :, :end]


def timed(run, steps):
    run()
    seconds = []
    for _ in range(steps):
        begun = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("what", choices=["train", "prefill", "decode"])
    p.add_argument("--preset", default="gpt2", choices=PRESETS)
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--seq", type=int, default=256)
    p.add_argument("--dtype", default="bf16", choices=["bf16", "fp32"])
    p.add_argument("--steps", type=int, default=3)
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--compile", action="store_true")
    o = p.parse_args()
    torch.set_num_threads(o.threads)
    torch.manual_seed(0)
    layers, dim, heads, kv_heads, ffn, vocab, family = PRESETS[o.preset]
    model = Model(layers, dim, heads, kv_heads, ffn, vocab, family, max(1024, o.seq + o.steps + 8))
    ids = torch.randint(vocab, (o.batch, o.seq))
    low = torch.bfloat16 if o.dtype == "bf16" else torch.float32
    if o.what == "train":
        run_model = torch.compile(model) if o.compile else model
        optimiser = torch.optim.AdamW(
            model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )

        def run():
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=o.dtype == "bf16"):
                loss = run_model(ids, ids)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

        seconds, tokens = timed(run, o.steps), o.batch * o.seq
    else:
        model = model.to(low).eval()
        cache = Cache(model, o.batch, o.seq + o.steps + 8, low)
        with torch.inference_mode():
            if o.what == "prefill":

                def run():
                    cache.length = 0
                    model(ids, cache=cache)

                seconds, tokens = timed(run, o.steps), o.batch * o.seq
            else:
                model(ids, cache=cache)
                seconds, tokens = timed(lambda: model(ids[:, :1], cache=cache), o.steps), o.batch
    print(
        json.dumps(
            {
                "peer": "PyTorch " + torch.__version__ + (" compiled" if o.compile else ""),
                "what": o.what,
                "dtype": o.dtype,
                "tokens_per_s": tokens / seconds,
                "step_ms": 1e3 * seconds,
                "peak_rss_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            }
        )
    )


if __name__ == "__main__":
    main()
