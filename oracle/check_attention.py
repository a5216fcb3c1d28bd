"""Checks `tril attention` against PyTorch in double precision, on random descriptions.

usage: check_attention.py TRIL [--cases N] [--seed S] [--impl NAME] [--device NAME] [--only N]
                          [--goldens DIR]

TRIL is the built command (with --device cuda on a machine without a GPU:
build/tests/cuda/emulation/tril_on_emulated_gpu). Each case draws shapes, a visibility rule, a bias, sinks, ALiBi, softcap,
dropout and a dtype; an explicit mask and autograd say what o, lse, p and every gradient should be.
The bound is max|out - ref| <= r max|pt - ref| + 2 max|(ref + 0.3 - 0.3) - ref|, where pt is the
plain formula in the case's own dtype with the scale on the other operand; r = 2 forward, 3 for
gradients. Prints what fails (with what repeats it) and exits 1. --goldens writes the cases kept in
tests/golden/attention. Needs torch, numpy and safetensors; see README.md beside this file.
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from rules import rule_mask

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WIDTHS = [1, 2, 7, 8, 10, 16, 31, 32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256]


# ---- rules (rules.py holds the mask they mean)

def rule_draw(r, T, U):
    """A rule as text; the parts' numbers are drawn so that they matter at this size."""
    near = lambda: r.randint(1, max(1, min(40, U)))
    parts = {
        "window": lambda: f"window:{near()}",
        "sinks": lambda: f"sinks:{r.randint(1, 5)}",
        "global": lambda: "global:" + ",".join(str(r.randrange(U)) for _ in range(r.randint(1, 4))),
        "dilated": lambda: f"dilated:{r.randint(1, 6)},{r.randint(1, 7)}",
        "strided": lambda: f"strided:{near()}",
        "fixed": lambda: (lambda n: f"fixed:{n},{r.randint(0, n)}")(near()),
        "chunk": lambda: f"chunk:{near()}",
        "blocks": lambda: "blocks",
    }
    count = r.choice([0, 0, 1, 1, 1, 2, 3])
    chosen = [parts[name]() for name in r.sample(sorted(parts), count)]
    if r.random() < 0.3 or not chosen:
        chosen.insert(r.randint(0, len(chosen)), r.choice(["causal", "full"]))
    return "+".join(chosen)


def alibi(heads):
    def power(n):
        return [2.0 ** (-8.0 * h / n) for h in range(1, n + 1)]
    p = 2 ** int(math.log2(heads))
    return torch.tensor(power(p) + power(2 * p)[0::2][: heads - p])


# ---- dropout: Philox4x32-10, as tril/attention.h says

def philox(counter, key):
    c = [x.astype(np.uint64) for x in counter]
    k0, k1 = key
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(b >> np.uint64(32)) ^ c[1] ^ np.uint64(k0), b & low,
             (a >> np.uint64(32)) ^ c[3] ^ np.uint64(k1), a & low]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(c, -1)


def keep_mask(seed, B, H, T, U, p):
    """Which probabilities survive: uniform >= p, [B, H, T, U]."""
    use = 3  # the number of this use of random numbers in a layer (enum random_use)
    row = np.arange(H * T, dtype=np.uint64)[:, None] << np.uint64(32)
    element = row + np.arange(U, dtype=np.uint64)[None, :]
    block, word = element >> np.uint64(2), (element & np.uint64(3)).astype(np.int64)
    masks = []
    for b in range(B):
        key = ((seed & 0xFFFFFFFF) ^ (b * 0x9E3779B9 & 0xFFFFFFFF), (seed >> 32 & 0xFFFFFFFF) ^ use)
        zero = np.zeros_like(block)
        words = philox((block & np.uint64(0xFFFFFFFF), block >> np.uint64(32), zero,
                        zero + np.uint64(use << 16)), key)
        words = np.take_along_axis(words, word[..., None], -1)[..., 0]
        uniform = (words >> np.uint64(8)).astype(np.float64) * 2.0 ** -24
        masks.append((uniform >= np.float32(p)).reshape(H, T, U))
    return torch.from_numpy(np.stack(masks))


# ---- the formula

def attention(t, mask, o, dtype, swap):
    """o, lse, p and gradients in `dtype`; swap puts the scale on the other operand."""
    x = {n: t[n].to(dtype).requires_grad_(True) for n in ("q", "k", "v")}
    for n in ("bias", "sink"):
        if n in t:
            x[n] = t[n].to(dtype).requires_grad_(True)
    group = x["q"].shape[1] // x["k"].shape[1]
    k, v = (x[n].repeat_interleave(group, 1) for n in ("k", "v"))
    q, scale = x["q"], o["scale"]
    s = q @ (k * scale).mT if swap else (q * scale) @ k.mT
    if o["softcap"]:
        s = o["softcap"] * torch.tanh(s / o["softcap"])
    T, U = s.shape[-2:]
    if o["alibi"]:
        distance = (torch.arange(T)[:, None] + U - T - torch.arange(U)[None, :]).abs()
        s = s - (alibi(s.shape[1]).double()[:, None, None] * distance).to(dtype)
    if "bias" in x:
        s = s + x["bias"]
    s = torch.where(mask, s, torch.tensor(-math.inf, dtype=dtype))
    sink = x["sink"][None, :, None, None] if "sink" in x else None
    m = s.detach().amax(-1, keepdim=True)
    if sink is not None:
        m = torch.maximum(m, sink.detach())
    base = torch.where(m.isfinite(), m, torch.zeros_like(m))
    e = torch.exp(s - base)
    total = e.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink - base)
    p = e / torch.where(total > 0, total, torch.ones_like(total))
    if o["dropout"]:
        p = p * (t["keep"] / (1 - float(np.float32(o["dropout"])))).to(dtype)
    out = {"o": p @ v, "p": p, "lse": (base + torch.log(total))[..., 0]}
    if "do" in t:
        names = list(x)
        grads = torch.autograd.grad((out["o"] * t["do"].to(dtype)).sum(), [x[n] for n in names])
        out.update({"d" + n: g for n, g in zip(names, grads)})
    return {n: y.detach() for n, y in out.items()}


def linear(t, mask, o, dtype, swap):
    """The same, of linear attention, quadratically: phi(q_i).phi(k_j) in place of exp."""
    x = {n: t[n].to(dtype).requires_grad_(True) for n in ("q", "k", "v")}
    group = x["q"].shape[1] // x["k"].shape[1]
    phi = lambda y: torch.nn.functional.elu(y) + 1
    k, v = phi(x["k"]).repeat_interleave(group, 1), x["v"].repeat_interleave(group, 1)
    s = torch.where(mask, phi(x["q"]) @ k.mT, torch.zeros((), dtype=dtype))
    out = {"o": (s @ v) / s.sum(-1, keepdim=True)}
    if "do" in t:
        names = ("q", "k", "v")
        grads = torch.autograd.grad((out["o"] * t["do"].to(dtype)).sum(), [x[n] for n in names])
        out.update({"d" + n: g for n, g in zip(names, grads)})
    return {n: y.detach() for n, y in out.items()}


# ---- one case

def case_draw(seed, impls):
    r = random.Random(seed)
    g = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=g)
    B, Hk, group = r.choice([1, 1, 2, 3]), r.choice([1, 1, 2, 3]), r.choice([1, 1, 2, 4])
    H, d = Hk * group, r.choice(WIDTHS)
    T = r.choice([1, 2, 5, 8, 13, 33, 64, 65, 100, 131, 200])
    U = r.choice([T, T, T, 1, 3, 17, 48, 64, 97, 128, 150, 257])
    o = {"impl": r.choice(impls), "dtype": r.choice(["fp32", "fp32", "bf16", "fp16"]),
         "softcap": 0.0, "alibi": False, "dropout": 0.0, "seed": 0, "scale": d ** -0.5}
    if o["impl"] == "linear":
        U = T
    size = r.choice([1, 1, 1, 3])
    t = {"q": randn(B, H, T, d) * size, "k": randn(B, Hk, U, d), "v": randn(B, Hk, U, d),
         "do": randn(B, H, T, d)}
    arguments, rules = [], []
    bq, bk = r.choice([1, 4, 16, 64]), r.choice([1, 5, 16, 64])
    if o["impl"] == "linear":
        rules = [r.choice(["causal", "full"])]
        arguments += ["--visible", rules[0]]
        masks = [rule_mask(rules[0], T, U, None, 0, 0)] * H
    else:
        if r.random() < 0.3:
            o["scale"] = r.choice([0.0, 0.3, 1.0, -0.2])
            arguments += ["--scale", str(o["scale"])]
        if r.random() < 0.3:
            o["softcap"] = r.choice([0.5, 2.0, 30.0])
            arguments += ["--softcap", str(o["softcap"])]
        if r.random() < 0.3:
            o["alibi"] = True
            arguments += ["--alibi"]
        if r.random() < 0.3:
            o["dropout"], o["seed"] = r.choice([0.1, 0.17, 0.5]), r.randrange(1 << 40)
            arguments += ["--dropout", str(o["dropout"]), "--seed", str(o["seed"])]
        if r.random() < 0.35:
            t["bias"] = randn(r.choice([1, H]), T, U)
            if r.random() < 0.3:
                t["bias"] = t["bias"].bfloat16()
        if r.random() < 0.35:
            t["sink"] = randn(H)
        cut = sorted(r.sample(range(1, H), r.randint(1, min(2, H - 1)))) if H > 1 and r.random() < 0.3 else []
        masks = []
        for first, last in zip([0] + cut, cut + [H]):
            rule = rule_draw(r, T, U)
            if "blocks" in rule and "blocks" not in t:
                grid = (-(-T // bq), -(-U // bk))
                t["blocks"] = (torch.rand(grid, generator=g) < 0.5).to(torch.uint8)
                arguments += ["--block", f"{bq},{bk}"]
            heads = f"{first}-{last - 1}=" if cut else ""
            if heads or rule != "causal" or r.random() < 0.5:
                arguments += ["--visible", heads + rule]
            masks += [rule_mask(rule, T, U, t.get("blocks"), bq, bk)] * (last - first)
    for n in ("q", "k", "v", "do"):
        t[n] = t[n].to(DTYPES[o["dtype"]])
    shape = f"B={B} H={H} Hk={Hk} T={T} Tk={U} d={d}"
    arguments += ["--impl", o["impl"], "--dtype", o["dtype"], "--grads"]
    arguments += ["--probs"] if o["impl"] != "linear" else []
    return t, torch.stack(masks)[None], o, arguments, shape


def floors(t, mask, ref, o, dtype):
    """What rounding alone is worth where the results cancel (a single key has no gradient for q) or
    are too few for the plain formula to show it: an fp32 score is off by a few epsilons of the sum of
    its terms' magnitudes, o is stored in the case's dtype before the backward reads it."""
    group = t["q"].shape[1] // t["k"].shape[1]
    q, do = t["q"].double().abs(), t["do"].double().abs()
    k, v = (t[n].double().abs().repeat_interleave(group, 1) for n in ("k", "v"))
    most = lambda x: x.max().item()
    per_kv = lambda x: x.unflatten(1, (-1, group)).sum(2)
    if "p" not in ref:  # linear: sums of d and Tk positive terms, then a division
        phi = lambda n: torch.nn.functional.elu(t[n].double()) + 1
        fk = phi("k").repeat_interleave(group, 1)
        s = torch.where(mask, phi("q") @ fk.mT, 0.0)
        z, es = s.sum(-1, keepdim=True), 16 * 2.0 ** -24
        delta = (do * ref["o"].abs()).sum(-1, keepdim=True)
        ds = torch.where(mask, es * (do @ v.mT + delta) + torch.finfo(dtype).eps * delta, 0.0) / z
        return {"o": es * most(s @ v / z), "dq": most(ds @ fk), "dk": most(per_kv(ds.mT @ phi("q"))),
                "dv": es * most(per_kv((s / z).mT @ do))}
    p, T, U = ref["p"], q.shape[2], k.shape[2]
    terms = abs(o["scale"]) * (q @ k.mT) + (U + T if o["alibi"] else 0)
    terms = terms + (t["bias"].double().abs() if "bias" in t else 0)
    es = 4 * 2.0 ** -24 * terms.max().item() + 8 * 2.0 ** -24
    dp = (do @ v.mT) / (1 - o["dropout"])
    delta = (do * ref["o"].abs()).sum(-1, keepdim=True)
    ds = p * (2 * es * (dp + delta) + torch.finfo(dtype).eps * delta)
    return {"lse": es, "p": 2 * es * most(p), "o": 2 * es * most(p @ v),
            "dq": most(ds @ k) * abs(o["scale"]), "dk": most(per_kv(ds.mT @ q)) * abs(o["scale"]),
            "dv": 2 * es * most(per_kv(p.mT @ do)), "dbias": most(ds.sum((0, 1))),
            "dsink": most(ds.sum((0, 2, 3))) + 2 * es * most(delta.sum((0, 2)))
            + torch.finfo(dtype).eps * most(delta.sum((0, 2)))}


def bound(name, ref, plain, dtype, floor):
    """What the plain formula in the same dtype is worth, and the rounding of the result itself."""
    finite = ref.isfinite()
    largest = ref[finite].abs().max().item() if finite.any() else 0
    both = finite & plain.isfinite()  # (fp16 may underflow to 0 / 0 in the plain formula)
    error = (plain.double() - ref)[both].abs().max().item() if both.any() else 0
    stored = ref.to(dtype)
    rounding = ((stored + 0.3 - 0.3).double() - ref)[finite].abs().max().item() if finite.any() else 0
    return ((2 if name in ("o", "lse", "p") else 3) * error + 2 * rounding + 1e-6 * largest
            + floor.get(name, 0))


def case_run(tril, seed, impls, folder, keep=None, device="cpu"):
    t, mask, o, arguments, shape = case_draw(seed, impls)
    if o["dropout"]:
        B, H, T, _ = t["q"].shape
        t["keep"] = keep_mask(o["seed"], B, H, T, t["k"].shape[2], o["dropout"])
    source, target = os.path.join(folder, "in.safetensors"), os.path.join(folder, "out.safetensors")
    save_file({n: x.contiguous() for n, x in t.items() if n != "keep"}, source)
    run = subprocess.run([tril, "attention", "--qkv", source, "--out", target, "--device", device,
                          *arguments],
                         capture_output=True, text=True)
    label = f"seed {seed}: {shape} {' '.join(arguments)}" + "".join(
        f" +{n}{list(t[n].shape)}" for n in ("bias", "sink") if n in t)
    if run.returncode != 0:
        return [f"{label}\n     exit code {run.returncode}: {run.stderr.strip()}"]
    out = load_file(target)
    formula = linear if o["impl"] == "linear" else attention
    ref = formula(t, mask, o, torch.float64, False)
    plain = formula(t, mask, o, DTYPES[o["dtype"]], True)
    faults = []
    if set(out) != {n for n in ref}:
        faults.append(f"{label}\n     tensors {sorted(out)}, not {sorted(ref)}")
        return faults
    floor = floors(t, mask, ref, o, DTYPES[o["dtype"]])
    for n, r in ref.items():
        x = out[n].double()
        dtype = torch.float32 if n in ("lse", "p", "dbias", "dsink") else DTYPES[o["dtype"]]
        if out[n].dtype != dtype or x.shape != r.shape:
            faults.append(f"{label}\n     {n}: {out[n].dtype} {list(x.shape)}, not {dtype} {list(r.shape)}")
            continue
        same_holes = torch.equal(x.isfinite(), r.isfinite())
        good = r.isfinite() & x.isfinite()
        error = (x - r)[good].abs().max().item() if good.any() else 0
        limit = bound(n, r, plain[n], dtype, floor)
        if not same_holes or not error <= limit:
            faults.append(f"{label}\n     {n}: off by {error:.2e}, allowed {limit:.2e}"
                          + ("" if same_holes else "; infinities differ"))
    if keep is not None and not faults:
        keep(t, mask, ref, plain, arguments, label)
    return faults


def goldens_write(tril, folder, directory):
    """Small cases that between them have every feature; expectations in double, as fp32, with bounds."""
    os.makedirs(directory, exist_ok=True)
    index, wanted = [], 24
    seen = set()
    seed = 0
    while len(index) < wanted and seed < 4000:
        seed += 1
        t, _, o, arguments, shape = case_draw(seed, ["flash", "linear"])
        if sum(x.numel() for x in t.values()) > 1500 or t["q"].shape[2] * t["k"].shape[2] > 700:
            continue
        features = {o["dtype"], o["impl"]} | {n for n in ("bias", "sink") if n in t}
        features |= {a for a in arguments if a.startswith("--")}
        features |= {p.partition(":")[0] for a in arguments for p in a.rpartition("=")[2].split("+")
                     if p.partition(":")[0] in ("window", "sinks", "global", "dilated", "strided",
                                                "fixed", "chunk", "blocks", "full")}
        if features <= seen:
            continue

        def keep(t, mask, ref, plain, arguments, label):
            name = f"{len(index):02d}"
            bounds, floor = {}, floors(t, mask, ref, o, DTYPES[o["dtype"]])
            for n, r in ref.items():
                dtype = torch.float32 if n in ("lse", "p", "dbias", "dsink") else DTYPES[o["dtype"]]
                bounds[n] = bound(n, r, plain[n], dtype, floor)
            tensors = {n: x.contiguous() for n, x in t.items() if n != "keep"}
            save_file(tensors, os.path.join(directory, f"{name}-in.safetensors"))
            save_file({n: r.float().contiguous() for n, r in ref.items() if n != "p"},
                      os.path.join(directory, f"{name}-out.safetensors"))
            index.append({"name": name, "arguments": [a for a in arguments if a != "--probs"
                                                      and a != "--impl" and a != o["impl"]],
                          "linear": o["impl"] == "linear",
                          "bounds": {n: b for n, b in bounds.items() if n != "p"}})

        faults = case_run(tril, seed, ["flash", "linear"], folder, keep)
        if faults:
            print("\n".join(faults))
            continue
        seen |= features
    with open(os.path.join(directory, "cases.json"), "w") as f:
        json.dump(index, f, indent=1)
        f.write("\n")
    print(f"{len(index)} goldens: {sorted(seen)}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("tril")
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="one case, by its seed")
    parser.add_argument("--impl", action="append",
                        choices=["flash", "fused", "materialised", "reference", "linear"])
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--goldens", help="write golden files there instead")
    a = parser.parse_args()
    torch.set_num_threads(1)
    impls = a.impl or (["flash", "flash", "flash", "fused", "materialised", "reference", "linear"]
                       if a.device == "cpu" else ["flash", "flash", "flash", "materialised", "linear"])
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        if a.goldens:
            goldens_write(a.tril, folder, a.goldens)
            return
        seeds = [a.only] if a.only is not None else range(a.seed, a.seed + a.cases)
        for seed in seeds:
            faults = case_run(a.tril, seed, impls, folder, device=a.device)
            failed += bool(faults)
            for fault in faults:
                print("FAIL " + fault, flush=True)
    print(f"{len(seeds) - failed} of {len(seeds)} cases agree with PyTorch in double")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
