"""tril, tiktoken and Hugging Face tokenizers on the same text in the same run, one thread each.

    python tokenizer.py path/to/tril TEXT TOKENIZER [--train FILE] [--rounds N]

TOKENIZER is a tiktoken rank file with GPT-2's ranks (r50k_base.tiktoken) beside a folder gpt2/ with vocab.json
and merges.txt, or the folder's parent. The three take turns; a figure is the median of N rounds, megabytes
(10^6 bytes) of text per second, after the ids were compared. --train FILE also trains 8192 tokens on it with
tril and tokenizers, both with all threads.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time

os.environ["RAYON_NUM_THREADS"] = os.environ.get("RAYON_NUM_THREADS", "1")

import tiktoken  # noqa: E402
import tokenizers  # noqa: E402
from tiktoken.load import load_tiktoken_bpe  # noqa: E402

GPT2 = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""  # tiktoken's own form


def timed(f):
    began = time.perf_counter()
    result = f()
    return time.perf_counter() - began, result


def tril(command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stderr)
    return json.loads(done.stdout)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("tril")
    p.add_argument("text")
    p.add_argument("tokenizers", help="the folder with r50k_base.tiktoken and gpt2/")
    p.add_argument("--train")
    p.add_argument("--rounds", type=int, default=5)
    a = p.parse_args()
    ranks = os.path.join(a.tokenizers, "r50k_base.tiktoken")
    folder = os.path.join(a.tokenizers, "gpt2")
    with open(a.text, encoding="utf-8", newline="") as f:
        text = f.read()
    size = len(text.encode())
    tik = tiktoken.Encoding("r50k", pat_str=GPT2, mergeable_ranks=load_tiktoken_bpe(ranks), special_tokens={})
    hug = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(os.path.join(folder, "vocab.json"), os.path.join(folder, "merges.txt")))
    hug.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    ours = subprocess.run([a.tril, "tokenizer", "encode", "--tokenizer", ranks, "--json", a.text], capture_output=True, text=True)
    ids = json.loads(ours.stdout)
    assert ids == tik.encode_ordinary(text), "tril and tiktoken give other ids"
    lines = text.splitlines(keepends=True)  # tokenizers is slow and large on one long text: by lines, as it is used
    speeds = {"tril": [], "tiktoken": [], "tokenizers": []}
    for _ in range(a.rounds):
        info = tril([a.tril, "tokenizer", "info", "--tokenizer", ranks, "--threads", "1", "--json", a.text])
        speeds["tril"].append(info["megabytes_per_second"])
        speeds["tiktoken"].append(size / 1e6 / timed(lambda: tik.encode_ordinary(text))[0])
        speeds["tokenizers"].append(size / 1e6 / timed(lambda: hug.encode_batch_fast(lines, add_special_tokens=False))[0])
    for name, values in speeds.items():
        print(f"encode, one thread: {name} {statistics.median(values):.1f} MB/s ({min(values):.1f} to {max(values):.1f})")
    if not a.train:
        return
    seconds = {"tril": [], "tokenizers": []}
    for _ in range(a.rounds):
        command = [a.tril, "tokenizer", "train", "--vocab", "8192", "--out", "/dev/null", "--quiet", "--json", a.train]
        seconds["tril"].append(timed(lambda: tril(command))[0])
        t = tokenizers.Tokenizer(tokenizers.models.BPE())
        t.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=8192, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        seconds["tokenizers"].append(timed(lambda: t.train([a.train], trainer))[0])
    for name, values in seconds.items():
        print(f"train 8192 tokens on {os.path.getsize(a.train) / 1e6:.1f} MB: {name} {statistics.median(values):.2f} s ({min(values):.2f} to {max(values):.2f})")


if __name__ == "__main__":
    main()
