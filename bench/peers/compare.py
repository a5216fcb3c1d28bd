"""tril and PyTorch on the same shapes in the same run: a Markdown table of medians and ratios.

    python compare.py path/to/tril [--only TEXT] [--rounds N] [--isa avx2|avx512] [--out FILE]

The two take turns (tril, PyTorch, tril, ...), so that a machine whose speed drifts drifts for both;
a row shows the median over the rounds. --isa holds both to an instruction set.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))

# what, shape options of tril, preset of the peer, batch, seq, dtype, steps
SMALL = ["--preset", "gpt2", "--layers", "4", "--dim", "256", "--heads", "4", "--vocab", "4096"]
CASES = [
    ("train", ["--preset", "gpt2"], "gpt2", 4, 256, "fp32", 3),
    ("train", ["--preset", "gpt2"], "gpt2", 4, 256, "bf16", 2),
    ("train", ["--preset", "gpt2"], "gpt2", 4, 1024, "fp32", 1),
    ("train", ["--preset", "gpt2"], "gpt2", 4, 1024, "bf16", 1),
    ("train", SMALL, "small", 8, 256, "fp32", 5),
    ("train", SMALL, "small", 8, 256, "bf16", 3),
    ("prefill", ["--preset", "gpt2"], "gpt2", 1, 512, "fp32", 3),
    ("prefill", ["--preset", "llama-110m"], "llama-110m", 1, 512, "fp32", 3),
    ("prefill", ["--preset", "llama-110m"], "llama-110m", 1, 2048, "fp32", 2),
    ("prefill", ["--preset", "llama-110m"], "llama-110m", 1, 512, "bf16", 2),
    ("decode", ["--preset", "gpt2"], "gpt2", 1, 128, "fp32", 20),
    ("decode", ["--preset", "llama-110m"], "llama-110m", 1, 128, "fp32", 20),
    ("decode", ["--preset", "gpt2"], "gpt2", 1, 128, "bf16", 10),
    ("decode", ["--preset", "llama-110m"], "llama-110m", 1, 128, "bf16", 10),
]
ISA = {
    "avx2": {
        "TRIL_CPU": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "avx512": {
        "TRIL_CPU": "avx512",
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
}


def run(command, env):
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode != 0:
        print("%s\n%s" % (" ".join(command), done.stderr[-2000:]), file=sys.stderr)
        return None
    return json.loads(done.stdout[done.stdout.index("{") :])


def median(rows, key):
    values = [r[key] for r in rows if r]
    return statistics.median(values) if values else float("nan")


def main():
    p = argparse.ArgumentParser()
    p.add_argument("tril")
    p.add_argument("--only", default="")
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--isa", choices=ISA)
    p.add_argument("--compile", action="store_true", help="add torch.compile to training")
    p.add_argument("--out", help="write every measurement as JSON lines")
    o = p.parse_args()
    env = dict(os.environ, **(ISA[o.isa] if o.isa else {}))
    log = open(o.out, "w") if o.out else None
    print("| what | tril tokens/s | of the limit | PyTorch tokens/s | ratio | peak memory |")
    print("|---|---|---|---|---|---|")
    for what, shape, preset, batch, seq, dtype, steps in CASES:
        label = f"{what} {preset} B={batch} T={seq} {dtype}"
        if o.only not in label:
            continue
        common = ["--batch", str(batch), "--seq", str(seq), "--dtype", dtype]
        common += ["--steps", str(steps)]
        ours, theirs = [], []
        for _ in range(o.rounds):
            ours.append(run([o.tril, "bench", what, *shape, *common, "--json"], env))
            peer = [sys.executable, os.path.join(HERE, "torch_gpt.py"), what, "--preset", preset]
            peer += ["--compile"] if o.compile and what == "train" else []
            theirs.append(run(peer + common, env))
        a, b = median(ours, "tokens_per_s"), median(theirs, "tokens_per_s")
        limit = median(ours, "bandwidth_fraction" if what == "decode" else "mfu")
        unit = "bandwidth" if what == "decode" else "peak"
        memory = f"{median(ours, 'peak_rss_bytes') / 1e9:.2f}"
        memory += f" / {median(theirs, 'peak_rss_bytes') / 1e9:.2f} GB"
        print(f"| {label} | {a:.1f} | {100 * limit:.0f}% {unit} | {b:.1f} | {a / b:.2f} | {memory} |")
        sys.stdout.flush()
        if log:
            json.dump({"case": label, "tril": ours, "peer": theirs}, log)
            log.write("\n")


if __name__ == "__main__":
    main()
