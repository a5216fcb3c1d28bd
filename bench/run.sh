#!/usr/bin/env bash
# ./run bench: the machine's limits, tril's own figures, and (with a Python that has PyTorch) the same
# work in PyTorch, side by side in one run. Options go to bench/peers/compare.py; after --attention they
# go to compare_attention.py, and only attention is measured.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
tril=${TRIL:-$here/../build/tril}
python=${TRIL_PEERS_PYTHON:-$here/peers/.venv/bin/python}
"$tril" version
if [ ! -x "$python" ]; then
    cat <<TEXT
PyTorch is not set up, so tril is measured alone. For the comparison:
  python3 -m venv $here/peers/.venv && $here/peers/.venv/bin/pip install -r $here/peers/requirements.txt
or name a Python that has it in TRIL_PEERS_PYTHON.
TEXT
    for dtype in fp32 bf16; do
        "$tril" bench gemm --preset gpt2 --batch 4 --seq 256 --dtype $dtype
        "$tril" bench train --preset gpt2 --batch 4 --seq 256 --dtype $dtype --steps 3
        "$tril" bench prefill --preset llama-110m --seq 512 --dtype $dtype
        "$tril" bench decode --preset llama-110m --seq 128 --steps 30 --dtype $dtype
        "$tril" bench attention --heads 12 --seq 2048 --head-dim 64 --dtype $dtype
        "$tril" bench attention --decode --heads 32 --kv-heads 8 --head-dim 128 --dtype $dtype --steps 30
    done
    exit 0
fi
attention() {
    "$python" "$here/peers/compare_attention.py" "$tril" --plot "$here/../build/attention.svg" "$@"
}
if [ "${1:-}" = --attention ]; then
    shift
    attention "$@"
    exit
fi
"$python" "$here/peers/compare.py" "$tril" "$@"
[ $# -gt 0 ] || attention
