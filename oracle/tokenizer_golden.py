"""Writes tests/golden/tokenizer/: small tokenizers of every kind that tril reads, and the ids that Hugging
Face tokenizers and tiktoken give for texts written for the purpose.

usage: tokenizer_golden.py tests/golden/tokenizer

    NAME.json        a tokenizer.json as the tokenizers library writes it
    NAME/            the same as GPT-2's vocab.json and merges.txt
    ranks.tiktoken   a rank file
    cases.json       [{"file", "pattern" (rank files), "cases": [{"text", "ids", "decoded"}]}]

"decoded" is there where decoding does not give the text back (NFC, added spaces). Needs tokenizers and
tiktoken; versions.txt beside the goldens tells which were used.
"""

import base64
import json
import os
import sys

import tiktoken
import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tokenizer_fuzz import CL100K, CL100K_TIKTOKEN, GPT2, O200K, QWEN2

PROSE = """The ferry leaves the harbour at seven and comes back when it likes. We've taken it twice: once in
the rain, once in a fog so thick that the captain rang a bell every minute. "You'll see the island,"
he said, "when you're standing on it." I didn't believe him; he'd been right all the same.
Her notebook had 365 pages, numbered from 1 to 365, and a price on the cover: $12.50 (or 11,75 €).
def area(width, height):
    # no negative sides
    return max(width, 0) * max(height, 0)
Con mèo ngồi bên cửa sổ và nhìn mưa rơi trên mái nhà. Trời sẽ sáng thôi, bà nói; không sao đâu.
Der Fährmann grüßt, die Straße ist naß, und über dem Fluß hängt Nebel. L'été, ça ne dure jamais.
Кошка сидит у окна и смотрит на дождь. Ο καπετάνιος χτυπά την καμπάνα. 猫は窓のそばに座っている。
小船在雾中慢慢地走。 고양이가 창가에 앉아 있다. القطة تجلس قرب النافذة. बिल्ली खिड़की के पास बैठी है।
"""

TEXTS = [
    "",
    "a",
    " ",
    "  ",
    "\n",
    " \n \n  x",
    "a\n",
    "a \n",
    "a\n  ",
    "trailing   ",
    "\t\ttabs\tand\r\nlines\r\n\r\n",
    "I'll we've he'd IT'S DON'T 'twas y'all O'Neil 's 'S '\u017f",
    "1 12 123 1234 12345 3.14159 ½ ² Ⅷ ٣٤٥٦",
    "café cafe\u0301 A\u030a\u0323 \ufb01 한글 \u1112\u1161\u11ab",
    "ǅ ʰʰ AbCdEF aBC ABCdef ÉCOLE école İstanbul",
    "emoji: 👩\u200d🚀 🇻🇳 👍🏽 ❤\ufe0f",
    "<|endoftext|>",
    "a<|endoftext|>b <|endoftext|> \n<|endoftext|>",
    "a <mask> b<mask>c  <mask>\n<mask>x",
    "word<|w|>word <|w|> x<|w|>",
    "!!!???... --- ### /path/to/file.txt http://example.org/?q=1&r=2\n\n/\n",
    "\u00a0nbsp\u2003em\u3000wide\u180e\u200bzero\u2028line\x85next\x0bvt\x0cff",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "                                                                x",
    "日本語のテキスト、中文文本。한국어 텍스트",
    "\u0000\u0001\u007f\ufeff\ufffd\U0010ffff",
    "Ġ Ċ ġ",
    PROSE[:400],
    PROSE[-400:],
]


def build(name, pre, vocab=420, nfc=False, added=(), strings=False, ignore_merges=False, bos=None, corpus=PROSE):
    t = Tokenizer(models.BPE())
    if nfc:
        t.normalizer = normalizers.NFC()
    t.pre_tokenizer = pre
    t.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>"] + ([bos] if bos else [])
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    t.train_from_iterator(corpus.splitlines(keepends=True) * 2, trainer)
    for token in added:
        t.add_tokens([token])
    if bos:
        t.post_processor = processors.Sequence(
            [processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, t.token_to_id(bos))])]
        )
    document = json.loads(t.to_str())
    model = document["model"]
    model["ignore_merges"] = ignore_merges
    if strings:
        model["merges"] = [" ".join(m) for m in model["merges"]]
    return name, document


def split(pattern, **more):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), **more), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def main():
    out = sys.argv[1]
    os.makedirs(out, exist_ok=True)
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    flags = [
        AddedToken("<mask>", lstrip=True, special=True),
        AddedToken("<|w|>", single_word=True, special=False, normalized=False),
        AddedToken("x x", rstrip=True, special=False, normalized=False),
        AddedToken("cafe\u0301", special=False, normalized=True),
    ]
    made = [
        build("gpt2", plain, strings=True),
        build("prefix", pre_tokenizers.ByteLevel(add_prefix_space=True), added=flags),
        build("cl100k", split(CL100K, behavior="isolated"), ignore_merges=True),
        build("llama3", split(CL100K, behavior="removed", invert=True), bos="<|begin_of_text|>", strings=True),
        build("qwen2", split(QWEN2, behavior="isolated"), nfc=True, added=flags),
        build("o200k", split(O200K, behavior="isolated")),
        build("digits", pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain]), nfc=True),
        build(
            "splits",
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"),
                    pre_tokenizers.Split(Regex("[一-龥぀-ゟ゠-ヿ]+"), "isolated"),
                    pre_tokenizers.Split(Regex(r"\p{Lu}+\p{Ll}+"), "isolated"),
                    pre_tokenizers.Split(Regex(r"[\p{L}\p{M}]+|\s+(?!\S)|[^\p{L}\p{M}\s]+"), "isolated"),
                    pre_tokenizers.Split("/", "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            ),
            added=flags,
        ),
    ]
    files = []
    for name, document in made:
        path = os.path.join(out, name + ".json")
        with open(path, "w", encoding="utf-8") as f:
            json.dump(document, f, ensure_ascii=False, separators=(",", ":"))
        t = Tokenizer.from_file(path)
        cases = []
        for text in TEXTS:
            ids = t.encode(text, add_special_tokens=False).ids
            decoded = t.decode(ids, skip_special_tokens=False)
            cases.append({"text": text, "ids": ids} | ({"decoded": decoded} if decoded != text else {}))
        files.append({"file": name + ".json", "cases": cases})
        if name == "gpt2":
            directory = os.path.join(out, "gpt2")
            os.makedirs(directory, exist_ok=True)
            with open(os.path.join(directory, "vocab.json"), "w", encoding="utf-8") as f:
                json.dump(document["model"]["vocab"], f, ensure_ascii=False)
            with open(os.path.join(directory, "merges.txt"), "w", encoding="utf-8") as f:
                f.write("#version: 0.2\n" + "\n".join(document["model"]["merges"]) + "\n")
            files.append({"file": "gpt2", "cases": cases})
            alphabet = {c: b for b, c in zip([*range(33, 127), *range(161, 173), *range(174, 256)], map(chr, [*range(33, 127), *range(161, 173), *range(174, 256)]))}
            rest = [b for b in range(256) if b not in alphabet.values()]
            alphabet |= {chr(256 + i): b for i, b in enumerate(rest)}
            vocabulary = sorted((i, token) for token, i in document["model"]["vocab"].items() if token != "<|endoftext|>")
            ranks = {bytes(alphabet[c] for c in token): i - 1 for i, token in vocabulary}
            with open(os.path.join(out, "ranks.tiktoken"), "wb") as f:
                for token, rank in ranks.items():
                    f.write(base64.b64encode(token) + b" %d\n" % rank)
            for pattern, regex in (("gpt2", GPT2), ("cl100k_base", CL100K_TIKTOKEN), ("o200k", O200K)):
                e = tiktoken.Encoding(name, pat_str=regex, mergeable_ranks=ranks, special_tokens={})
                files.append({"file": "ranks.tiktoken", "pattern": pattern, "cases": [{"text": x, "ids": e.encode_ordinary(x)} for x in TEXTS]})
    with open(os.path.join(out, "cases.json"), "w", encoding="utf-8") as f:
        json.dump(files, f, ensure_ascii=False, separators=(",", ":"))
    with open(os.path.join(out, "versions.txt"), "w") as f:
        f.write(f"tokenizers {tokenizers.__version__}\ntiktoken {tiktoken.__version__}\n")


if __name__ == "__main__":
    main()
