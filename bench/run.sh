#!/usr/bin/env bash
# ./run bench: the machine's limits, tril's own figures, and (with a Python that has PyTorch) the same
# work in PyTorch, side by side in one run. Options go to bench/peers/compare.py.
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
    done
    exit 0
fi
exec "$python" "$here/peers/compare.py" "$tril" "$@"
