"""Opens a directory that tril wrote with transformers and compares the logits.

usage: check_transformers.py TRIL DIR [--text TEXT] [--tolerance X]

TRIL is the built command. Prints one line per check and exits 1 if one fails. Needs torch,
transformers (4.57 or 5) and safetensors; see README.md beside this file.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings

import torch
import transformers
from safetensors.torch import load_file

failures = 0


def check(name, good, detail=""):
    global failures
    failures += not good
    print(f"{'ok  ' if good else 'FAIL'} {name}{': ' + detail if detail else ''}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("tril")
    parser.add_argument("dir")
    parser.add_argument("--text", default="Once upon a time, the cat said: “Chào bạn!” 123")
    parser.add_argument("--tolerance", type=float, default=None)
    a = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            a.dir, attn_implementation="eager", output_loading_info=True)
    model = model.eval().float()
    wrong = {k: v for k, v in info.items() if v and k != "error_msgs" or (k == "error_msgs" and v)}
    check("every tensor is in its place", not wrong, str(wrong) if wrong else "")
    check("no warnings", not caught, "; ".join(str(w.message) for w in caught))

    config = model.config
    length = min(64, config.max_position_embeddings)
    ids = torch.randint(0, config.vocab_size, (length,)).tolist()
    if os.path.exists(os.path.join(a.dir, "tokenizer.json")):
        tokenizer = transformers.AutoTokenizer.from_pretrained(a.dir)
        theirs = tokenizer(a.text, add_special_tokens=False)["input_ids"]
        out = subprocess.run(
            [a.tril, "tokenizer", "encode", "--tokenizer", os.path.join(a.dir, "tokenizer.json"),
             "--json"], input=a.text.encode(), capture_output=True, check=True).stdout
        ours = json.loads(out)
        check("tokenizers agree", theirs == ours, f"{len(theirs)} tokens")
        check("decoding gives the text back", tokenizer.decode(theirs) == a.text)

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "logits.safetensors")
        subprocess.run([a.tril, "eval", "--model", a.dir, "--ids", " ".join(map(str, ids)),
                        "--logits", path], check=True, stdout=subprocess.DEVNULL)
        ours = load_file(path)["logits"]
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor([ids])).logits[0]
        # What transformers' own fp32 arithmetic is worth: the same in double.
        double = model.double()(input_ids=torch.tensor([ids])).logits[0]
    own = (theirs - double).abs().max().item()
    error = (ours - double).abs().max().item()
    scale = double.abs().max().item()
    allowed = a.tolerance if a.tolerance is not None else max(20 * own, 1e-5 * scale)
    check("logits agree", error <= allowed,
          f"within {error:.1e} of double precision (transformers in fp32: {own:.1e}, largest logit "
          f"{scale:.3g})")
    model = model.float()
    out = model.generate(torch.tensor([ids[:4]]), max_new_tokens=8, do_sample=False,
                         pad_token_id=0)
    check("generate runs", out.shape[1] > 4)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
