"""Compares tril's tokenizer with Hugging Face tokenizers and tiktoken on random texts.

usage: tokenizer_fuzz.py TRIL [--rounds N] [--seed S] [--samples N] [--tokenizer FILE]...

Each round makes a tokenizer.json at random (pattern, normaliser, prefix space, added tokens with random
flags, merges as strings or pairs, ignore_merges; its vocabulary trained by tokenizers on random text), or a
tiktoken rank file with a pattern, and some thousands of random samples of Unicode, which are encoded in
one text with a special token between them, so that each sample's end is an end of text. Ids must be
equal, and decoding must give the text back. --tokenizer adds given files (tokenizer.json, or a
directory) to every round. Needs tokenizers and tiktoken.
"""

import argparse
import base64
import json
import os
import random
import subprocess
import sys
import tempfile
import unicodedata

import tiktoken
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CL100K_TIKTOKEN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+|"
    r" ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
QWEN2 = CL100K.replace("{1,3}", "")
O200K = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
# Patterns that tril knows nothing about: they go through PCRE2.
OTHERS = [
    r"\p{N}| ?\p{L}+|[^\p{L}\p{N}]+",
    r" ?[^(\s|[.,!?…。，、।۔،])]+".replace("(\\s|[.,!?…。，、।۔،])", "\\s.,!?…。"),
    r"[\p{L}\p{M}]+|\p{N}{2}|\s+|[^\s\p{L}\p{M}\p{N}]+",
    r"\s+|\S+",
]

SPACES = " \t\n\r\x0b\x0c\x85\xa0\u1680\u2000\u2003\u200a\u2028\u2029\u202f\u205f\u3000\u200b\u180e\u200d\ufeff"
WORDS = "the of And I'll we've he'd IT'S don't O'Neil Việt Nam tiếng được năm naïve straße ΑΒΓ Привет мир 中文 日本語 한국어 नमस्ते שלום عربى ไทย DŽ ǅ ʰ ª".split()
QUOTES = ["'s", "'S", "'\u017f", "'t", "'re", "'RE", "'Ve", "'lL", "'d", "'M", "'x", "''", "’s"]
MARKS = ["\u0301", "\u0300", "\u0323", "\u093f", "\u0e33", "\u3099", "\u1161", "\u11a8", "\u200d", "\ufe0f", "\U000e0100"]


def character(r):
    kind = r.random()
    if kind < 0.25:
        return chr(r.randrange(32, 127))
    if kind < 0.35:
        return r.choice(SPACES)
    if kind < 0.45:
        return r.choice(MARKS)
    if kind < 0.6:
        return chr(r.randrange(0xA0, 0x600))
    if kind < 0.9:
        return chr(r.choice([r.randrange(0x600, 0xD800), r.randrange(0xE000, 0x10000)]))
    return chr(r.choice([r.randrange(0x10000, 0x20000), r.randrange(0x20000, 0x110000)]))


def sample(r, specials):
    out = []
    for _ in range(r.randrange(0, 12)):
        kind = r.random()
        if kind < 0.25:
            out.append(r.choice(["", " ", "  "]) + r.choice(WORDS))
        elif kind < 0.35:
            out.append("".join(r.choice(SPACES) for _ in range(r.randrange(1, 6))))
        elif kind < 0.42:
            out.append(r.choice(QUOTES))
        elif kind < 0.5:
            out.append("".join(r.choice("0123456789٣५²½Ⅷ") for _ in range(r.randrange(1, 8))))
        elif kind < 0.56:
            out.append(r.choice("a. -=中é") * r.randrange(1, 80))
        elif kind < 0.62:
            out.append("".join(r.choice("aAǅʰ中é\u0301Ⅷ ") for _ in range(r.randrange(1, 10))))
        elif kind < 0.68:
            out.append("".join(r.choice("!?.,;/\\()[]{}<>|_*#\r\n") for _ in range(r.randrange(1, 8))))
        elif kind < 0.74 and specials:
            out.append(r.choice(["", " ", "\n", "x"]) + r.choice(specials) + r.choice(["", " ", "\t ", "y", "-"]))
        elif kind < 0.8:
            out.append(unicodedata.normalize("NFD", r.choice(WORDS)))
        else:
            out.append("".join(character(r) for _ in range(r.randrange(1, 10))))
    return "".join(out)


class Tril:
    def __init__(self, path):
        self.path = path

    def encode(self, tokenizer, data, *more):
        p = subprocess.run([self.path, "tokenizer", "encode", "--tokenizer", tokenizer, "--json", *more], input=data, capture_output=True)
        if p.returncode:
            raise RuntimeError(p.stderr.decode(errors="replace"))
        return json.loads(p.stdout)

    def decode(self, tokenizer, ids, *more):
        p = subprocess.run([self.path, "tokenizer", "decode", "--tokenizer", tokenizer, *more], input=json.dumps(ids).encode(), capture_output=True)
        if p.returncode:
            raise RuntimeError(p.stderr.decode(errors="replace"))
        return p.stdout


def show_difference(name, samples, want_of, got_of):
    """Finds one sample that differs, for the report."""
    for s in samples:
        want, got = want_of(s), got_of(s)
        if want != got:
            print(f"FAIL {name}: {s!r}\n  want {want}\n  got  {got}")
            return
    print(f"FAIL {name}: differs only in context")


def random_tokenizer(r, directory):
    """A tokenizer.json as Hugging Face's library writes it; returns (path, specials, separator)."""
    separator = "<|endoftext|>"
    prefix = r.random() < 0.3
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
    kind = r.randrange(8)
    if kind == 0:
        pre, name = pre_tokenizers.ByteLevel(add_prefix_space=prefix), "gpt2"
    elif kind == 1:
        pre, name = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=r.random() < 0.5), pre_tokenizers.ByteLevel(add_prefix_space=prefix)]), "digits"
    elif kind == 2:
        first = pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated")
        second = pre_tokenizers.Split(Regex(r"[一-龥぀-ゟ゠-ヿ]+"), "isolated")
        pre, name = pre_tokenizers.Sequence([first, second, pre_tokenizers.Split(Regex(CL100K), "isolated"), byte_level]), "splits"
    else:
        pattern, name = [(CL100K, "cl100k"), (QWEN2, "qwen2"), (O200K, "o200k"), (GPT2, "gpt2 split"), (r.choice(OTHERS), "other")][kind - 3]
        if r.random() < 0.3:
            split = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
        else:
            split = pre_tokenizers.Split(Regex(pattern), "isolated")
        pre = pre_tokenizers.Sequence([split, byte_level])
    t = Tokenizer(models.BPE())
    nfc = r.random() < 0.4
    if nfc:
        t.normalizer = normalizers.NFC()
    t.pre_tokenizer = pre
    t.decoder = decoders.ByteLevel()
    corpus = [sample(r, []) for _ in range(400)] + [" ".join(r.choice(WORDS) for _ in range(30)) for _ in range(40)]
    trainer = trainers.BpeTrainer(
        vocab_size=r.choice([300, 600, 2000]), special_tokens=[separator], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    t.train_from_iterator(corpus, trainer)
    specials = [separator]
    contents = ["<a>", "<|x|>", "<a b>", "[MASK]", "é", "e\u0301x", "the", "<", "<<"]
    for content in r.sample(contents, r.randrange(0, 5)):
        t.add_tokens([AddedToken(content, single_word=r.random() < 0.3, lstrip=r.random() < 0.3, rstrip=r.random() < 0.3, normalized=r.random() < 0.4, special=r.random() < 0.5)])
        specials.append(content)
    document = json.loads(t.to_str())
    model = document["model"]
    model["ignore_merges"] = r.random() < 0.3
    if r.random() < 0.5:
        model["merges"] = [" ".join(m) if not isinstance(m, str) else m for m in model["merges"]]
    path = os.path.join(directory, "tokenizer.json")
    with open(path, "w", encoding="utf-8") as f:
        json.dump(document, f, ensure_ascii=r.random() < 0.5)
    return path, specials, separator, f"{name}{' nfc' if nfc else ''}{' prefix' if prefix else ''} {len(specials)} added", nfc or prefix


def check_hf(tril, name, path, specials, separator, samples, lossy):
    hf = Tokenizer.from_file(os.path.join(path, "tokenizer.json") if os.path.isdir(path) else path)
    joined = separator.join(samples)
    want = hf.encode(joined, add_special_tokens=False).ids
    got = tril.encode(path, joined.encode())
    if want != got:
        show_difference(name, samples, lambda s: hf.encode(s, add_special_tokens=False).ids, lambda s: tril.encode(path, s.encode()))
        return 1
    if not lossy and "é" not in specials and tril.decode(path, got) != joined.encode():
        stripped = any(a.lstrip or a.rstrip for a in hf.get_added_tokens_decoder().values())
        if not stripped and "removed" not in name:
            print(f"FAIL {name}: decoding does not give the text back")
            return 1
    return 0


def check_tiktoken(tril, r, directory, samples):
    """A rank file trained by tril, read by both."""
    corpus = os.path.join(directory, "corpus.txt")
    with open(corpus, "w", encoding="utf-8", newline="") as f:
        f.write("\n".join(sample(r, []) for _ in range(400)) + " ".join(r.choice(WORDS) for _ in range(3000)))
    name, pattern = r.choice([("gpt2", GPT2), ("cl100k_tiktoken", CL100K_TIKTOKEN), ("o200k", O200K), ("llama3", CL100K), (r"\s+|\S+", r"\s+|\S+")])
    trained = os.path.join(directory, "trained.json")
    subprocess.run([tril.path, "tokenizer", "train", "--vocab", str(r.choice([300, 700, 3000])), "--pattern", name, "--out", trained, "--quiet", corpus], check=True, capture_output=True)
    alphabet = dict(zip((chr(c) for c in list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256)) + list(range(256, 324))), list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256)) + [b for b in range(256) if not (33 <= b < 127 or 161 <= b < 173 or 174 <= b)]))
    vocabulary = json.load(open(trained, encoding="utf-8"))["model"]["vocab"]
    ranks = {bytes(alphabet[c] for c in token): i for token, i in vocabulary.items()}
    path = os.path.join(directory, "ranks.tiktoken")
    with open(path, "wb") as f:
        for token, rank in sorted(ranks.items(), key=lambda x: x[1]):
            f.write(base64.b64encode(token) + b" %d\n" % rank)
    encoding = tiktoken.Encoding("fuzz", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    failures = 0
    for text in ["\n".join(samples)] + samples[:25]:
        want, got = encoding.encode_ordinary(text), tril.encode(path, text.encode(), "--pattern", name)
        if want != got:
            print(f"FAIL tiktoken {name}: {text[:200]!r}\n  want {want[:60]}\n  got  {got[:60]}")
            failures += 1
            break
    return failures


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("tril")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--tokenizer", action="append", default=[])
    a = parser.parse_args()
    tril = Tril(a.tril)
    failures = texts = characters = 0
    for i in range(a.rounds):
        r = random.Random(a.seed * 1000003 + i)
        with tempfile.TemporaryDirectory() as directory:
            path, specials, separator, name, lossy = random_tokenizer(r, directory)
            samples = [sample(r, specials) for _ in range(a.samples)]
            plain = [sample(r, []) for _ in range(a.samples)]
            failures += check_hf(tril, f"round {i} {name}", path, specials, separator, samples, lossy)
            failures += check_tiktoken(tril, r, directory, plain)
            for given in a.tokenizer:
                failures += check_hf(tril, f"round {i} {given}", given, ["<|endoftext|>"], "<|endoftext|>", plain, True)
            texts += 2 * len(samples)
            characters += sum(map(len, samples)) + sum(map(len, plain))
            junk = bytes(r.randrange(256) for _ in range(5000))
            if not lossy and not any(s in junk.decode("latin-1") for s in specials) and tril.decode(path, tril.encode(path, junk, "--no-special")) != junk:
                print(f"FAIL round {i} {name}: random bytes do not come back")
                failures += 1
        print(f"round {i}: {name}", flush=True)
    print(f"{a.rounds} rounds, {texts} texts, {characters} characters, {failures} failures")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
