"""tril's attention and PyTorch's scaled_dot_product_attention in turns: a Markdown table, and a plot
over T.

    python compare_attention.py path/to/tril [--only TEXT] [--rounds N] [--isa avx2|avx512]
                                [--quick] [--out FILE.json] [--plot FILE.svg]

Every row is measured in one run, the two taking turns (tril, PyTorch, tril, ...); a cell shows the
median over the rounds. "Of the peak" is useful FLOPs against the peak rate measured in that run.
"""
import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile

from compare import ISA, run

HERE = os.path.dirname(os.path.abspath(__file__))

# label, batch, heads, kv heads, seq, width, dtype, steps, more options of tril, of PyTorch
def rows(quick):
    over = [512, 1024, 2048] if quick else [512, 1024, 2048, 4096, 8192]
    for dtype in ("fp32", "bf16"):
        for T in over:
            steps = 5 if T <= 1024 else 3 if T <= 4096 else 2
            yield (f"{dtype} H=12 d=64 T={T}", 1, 12, 12, T, 64, dtype, steps, [], [])
    T = 1024 if quick else 4096
    for dtype in ("fp32", "bf16"):
        yield (f"{dtype} H=8 d=128 T={T}", 1, 8, 8, T, 128, dtype, 3, [], [])
        yield (f"{dtype} H=12 d=128 T={T // 2}", 1, 12, 12, T // 2, 128, dtype, 3, [], [])
        yield (f"{dtype} B H=1 d=64 T={T}", 1, 1, 1, T, 64, dtype, 3, [], [])
        yield (f"{dtype} GQA H=12 Hk=3 d=64 T={T // 2}", 1, 12, 3, T // 2, 64, dtype, 3, [], [])
    yield (f"fp32 window 256 H=12 d=64 T={T}", 1, 12, 12, T, 64, "fp32", 3,
           ["--visible", "window:256"], ["--window", "256"])
    yield ("fp32 small B=4 H=1 d=10 T=8", 4, 1, 1, 8, 10, "fp32", 50000, [], [])
    N = 2048 if quick else 8192
    for dtype in ("fp32", "bf16"):
        yield (f"{dtype} decode H=32 Hk=8 d=128, {N} cached", 1, 32, 8, 1, 128, dtype, 30,
               ["--decode", "--cache", str(N)], ["--decode", "--cache", str(N)])


def median(runs, key):
    values = [r[key] for r in runs if r and key in r]
    return statistics.median(values) if values else None


def show_ms(ms):
    if ms is None:
        return ""
    return f"{1e6 * ms:.0f} ns" if ms < 0.1 else f"{ms:.2f} ms"


def main():
    p = argparse.ArgumentParser()
    p.add_argument("tril")
    p.add_argument("--only", default="")
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--isa", choices=ISA)
    p.add_argument("--quick", action="store_true", help="shorter sequences")
    p.add_argument("--out", help="write every measurement as JSON lines")
    p.add_argument("--plot", help="draw the rows over T as SVG (by tril plot)")
    o = p.parse_args()
    env = dict(os.environ, **(ISA[o.isa] if o.isa else {}))
    log = open(o.out, "w") if o.out else None
    print("| attention, causal | forward | of the limit | PyTorch | ratio | backward | of the peak "
          "| PyTorch | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    points = {}
    for label, B, H, K, T, d, dtype, steps, ours_more, theirs_more in rows(o.quick):
        if o.only not in label:
            continue
        common = ["--batch", str(B), "--heads", str(H), "--kv-heads", str(K), "--seq", str(T)]
        common += ["--head-dim", str(d), "--dtype", dtype, "--steps", str(steps)]
        ours, theirs = [], []
        for _ in range(o.rounds):
            ours.append(run([o.tril, "bench", "attention", *common, *ours_more, "--json"], env))
            peer = [sys.executable, os.path.join(HERE, "torch_attention.py"), *common, *theirs_more]
            theirs.append(run(peer, env))
        line = [label]
        for way in ("forward", "backward"):
            a, b = median(ours, way + "_ms"), median(theirs, way + "_ms")
            rate, peak = median(ours, way + "_flops_per_s"), median(ours, "peak_flops")
            limit = f"{100 * rate / peak:.0f}% peak" if a and peak else ""
            if median(ours, "bandwidth_fraction"):
                limit = f"{100 * median(ours, 'bandwidth_fraction'):.0f}% bandwidth"
            line += [show_ms(a), limit if a else "", show_ms(b), f"{b / a:.2f}" if a and b else ""]
            if "H=12 d=64 T=" in label and a and "G" not in label and "w" not in label:
                points.setdefault(T, {})[f"tril {dtype} {way}"] = rate / 1e9
                if b:
                    points[T][f"PyTorch {dtype} {way}"] = rate * a / b / 1e9
        print("| " + " | ".join(line) + " |", flush=True)
        if log:
            json.dump({"case": label, "tril": ours, "peer": theirs}, log)
            log.write("\n")
            log.flush()
    if o.plot and points:
        names = sorted({n for y in points.values() for n in y}, reverse=True)
        with tempfile.NamedTemporaryFile("w", suffix=".csv", newline="", delete=False) as f:
            table = csv.writer(f)
            table.writerow(["T", *names])
            for T in sorted(points):
                table.writerow([T, *(points[T].get(n, "") for n in names)])
        subprocess.run([o.tril, "plot", "--data", f.name, "--out", o.plot, "--log-x", "--log-y",
                        "--title", "Causal attention, H = 12, d = 64",
                        "--y-label", "useful GFLOP/s"], check=True)
        os.unlink(f.name)
        print(f"\n{o.plot} shows the rate over T.")


if __name__ == "__main__":
    main()
