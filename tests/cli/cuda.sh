#!/usr/bin/env bash
# --device cuda from the command line, on the emulated GPU (tests/cuda/emulation): training, evaluation,
# generation, inspection, attention and benchmarks give what they give on the CPU; without a GPU every
# command says so in one sentence.
set -euo pipefail
tril=$1
emulated=$(dirname "$tril")/tests/cuda/emulation/tril_on_emulated_gpu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
export TRIL_CACHE=$dir/cache
fail() {
    echo "FAILED: $*" >&2
    exit 1
}
if [ ! -x "$emulated" ]; then
    echo "skipped: there is no emulated GPU in this build (it needs a C++ compiler)"
    exit 77
fi

awk 'BEGIN { srand(7); split("the cat dog bird sun river old tree sings sleeps runs sees a small red", w, " ")
    for (i = 0; i < 300; i++) { n = 4 + int(rand() * 6); s = ""
        for (k = 0; k < n; k++) s = s w[1 + int(rand() * 15)] " "
        print s "and then the end." } }' >"$dir/text.txt"
head -2 "$dir/text.txt" >"$dir/short.txt"
"$tril" tokenizer train --vocab 280 --special '<|endoftext|>' --out "$dir/tok.json" "$dir/text.txt" 2>/dev/null

# values FILE NAME: the numbers of a field, one a line, to four digits
values() { grep -o "\"$2\": *[-0-9.e+]*" "$1" | awk -F: '{ printf "%.4g\n", $2 }'; }
# alike NAME FIELD...: what cpu.NAME and cuda.NAME say of these fields, to four digits
alike() {
    local name=$1 field
    shift
    for field; do
        [ -n "$(values "$dir/cpu.$name" "$field")" ] || fail "$name has no $field"
        diff <(values "$dir/cpu.$name" "$field") <(values "$dir/cuda.$name" "$field") >&2 ||
            fail "$name: $field on the GPU is not the CPU's"
    done
}

# ---- training: the same losses and norms; the checkpoint goes on on the other device
for device in cpu cuda; do
    "$emulated" train --device $device --data "$dir/text.txt" --tokenizer "$dir/tok.json" --layers 2 --dim 32 \
        --heads 4 --batch 2 --seq 16 --steps 4 --eval-every 4 --eval-tokens 32 --checkpoint-every 3 --sample-every 0 \
        --schedule constant --lr 3e-3 --dropout 0.1 --dtype fp32 --out "$dir/$device" --quiet
    cp "$dir/$device/log.jsonl" "$dir/$device.log"
done
[ "$(wc -l <"$dir/cuda.log")" = 4 ] || fail "the log does not have one line a step"
alike log loss grad_norm valid_loss
"$emulated" train --resume --device cuda --out "$dir/cpu" --steps 5 --quiet
"$emulated" train --resume --device cpu --out "$dir/cuda" --steps 5 --quiet
cp "$dir/cpu/log.jsonl" "$dir/cpu.log"
cp "$dir/cuda/log.jsonl" "$dir/cuda.log"
alike log loss grad_norm

# ---- offloading: the same bits with less of the GPU's memory, as predicted; going on in another mode
offloaded() { # OUT OPTION...
    local out=$1
    shift
    "$emulated" train --device cuda --data "$dir/text.txt" --tokenizer "$dir/tok.json" --layers 4 --dim 16 --heads 1 \
        --ffn 32 --batch 1 --seq 16 --grad-accum 2 --schedule constant --warmup-frac 0 --lr 3e-3 --eval-every 1 \
        --eval-tokens 32 --checkpoint-every 2 --dtype bf16 --out "$dir/$out" --quiet --json "$@" >"$dir/$out.json"
}
offloaded stays --steps 3
offloaded moved --steps 2 --offload all --recompute full
[ "$(values "$dir/moved.json" peak_pinned_bytes)" != 0 ] || fail "nothing was offloaded"
for run in stays moved; do
    awk -F'[:,]' '/predicted_device/ { p = $2 } /peak_device/ { m = $2 } END { d = p / m - 1
        exit !(m > 0 && d < 0.05 && d > -0.05) }' "$dir/$run.json" || fail "$run: not the memory that was predicted"
done
awk -F'[:,]' '/peak_device/ { m[++n] = $2 } END { exit !(m[2] < m[1]) }' "$dir/stays.json" "$dir/moved.json" ||
    fail "offloading took no less of the GPU's memory"
grep -q '"peak_device_bytes":[1-9].*"peak_pinned_bytes":[1-9]' "$dir/moved/log.jsonl" || fail "the log has no peaks"
"$emulated" train --resume --out "$dir/moved" --steps 3 --offload activations --recompute none --quiet
cmp "$dir/stays/model.safetensors" "$dir/moved/model.safetensors" || fail "offloading changed the model"
for field in loss valid_loss grad_norm; do
    diff <(values "$dir/stays/log.jsonl" $field) <(values "$dir/moved/log.jsonl" $field) >&2 || fail "offloading changed $field"
done
code=0
"$emulated" train --resume --device cpu --out "$dir/moved" --steps 4 2>"$dir/err" || code=$?
{ [ $code != 0 ] && grep -q 'give --offload none' "$dir/err"; } || fail "--offload on the CPU gave $code"

# ---- evaluation, generation, looking inside: one model on both
model=$dir/cpu
"$emulated" eval --device cuda --dtype tf32 --model "$model" --data "$dir/short.txt" --seq 16 --json >"$dir/tf32.eval"
code=0
"$emulated" eval --dtype tf32 --model "$model" --data "$dir/short.txt" --json 2>"$dir/err" || code=$?
{ [ $code = 2 ] && grep -q 'tf32 is how a GPU multiplies' "$dir/err"; } || fail "tf32 on the CPU gave $code"
for device in cpu cuda; do
    "$emulated" eval --device $device --model "$model" --data "$dir/short.txt" --seq 16 --json >"$dir/$device.eval"
    "$emulated" generate --device $device --model "$model" --dtype fp32 --prompt "the cat" --max-tokens 6 --greedy --quiet \
        >"$dir/$device.text"
    "$emulated" generate --device $device --model "$model" --dtype fp32 --prompt "the cat" --max-tokens 6 --temperature 0.9 \
        --top-k 50 --top-p 0.95 --repetition-penalty 1.1 --seed 3 --quiet >"$dir/$device.drawn"
    "$emulated" inspect attention --device $device --model "$model" --prompt "the cat sees" --json >"$dir/$device.look"
    "$emulated" inspect --shapes --device $device --model "$model" --seq 8 --all --json >"$dir/$device.shapes"
done
alike eval loss bits_per_byte
# tf32 rounds factors to 11 bits: near, and not the same
awk -F'[:,]' '/"loss"/ { x[++n] = $2 } END { d = x[2] / x[1] - 1; exit !(n == 2 && d != 0 && d < 2e-3 && d > -2e-3) }' \
    "$dir/cuda.eval" "$dir/tf32.eval" || fail "the loss in tf32 is not fp32's, rounded"
cmp "$dir/cpu.text" "$dir/cuda.text" || fail "another greedy text on the GPU"
cmp "$dir/cpu.drawn" "$dir/cuda.drawn" || fail "another text drawn on the GPU"
alike look entropy
grep -q '"attention / q"' "$dir/cuda.shapes" || fail "no shapes on the GPU"
cmp "$dir/cpu.shapes" "$dir/cuda.shapes" || fail "other shapes on the GPU"

# ---- attention by itself (its numbers: tests/cuda/test_attention_calls.c)
in=$(dirname "$0")/../golden/attention/02-in.safetensors
for dtype in fp32 bf16 fp16; do
    "$emulated" attention --device cuda --qkv "$in" --out "$dir/out.safetensors" --dtype $dtype --grads --probs --json >"$dir/json"
    grep -q '"device": "cuda"' "$dir/json"
    for name in o lse p dq dk dv; do grep -q "\"$name\"" "$dir/out.safetensors" || fail "no $name"; done
done
code=0
"$emulated" attention --device cuda --impl fused --qkv "$in" --out "$dir/out.safetensors" 2>"$dir/err" || code=$?
{ [ $code = 6 ] && grep -q 'materialised and linear' "$dir/err"; } || fail "--impl fused on the GPU gave $code"

# ---- benchmarks: their fields, with the GPU's own limits
for what in "--visible window:8" "--impl materialised" "--impl linear" "--decode --cache 40 --page 8 --kv-dtype q8"; do
    # shellcheck disable=SC2086 # several words
    "$emulated" bench attention --device cuda --heads 2 --seq 24 --head-dim 16 --steps 1 --json $what >"$dir/json"
    for name in forward_ms forward_flops_per_s peak_flops extra_bytes bytes_moved pairs; do
        grep -q "\"$name\"" "$dir/json" || fail "bench attention $what lacks $name"
    done
    grep -q '"isa": "emulated GPU"' "$dir/json" || fail "bench attention $what does not name the GPU"
done
grep -q '"bandwidth_bytes_per_s": *[1-9]' "$dir/json" || fail "no bandwidth beside a decoding"
"$emulated" bench train --device cuda --preset nano --layers 1 --dim 16 --heads 2 --ffn 16 --vocab 64 --context 16 --seq 8 \
    --dtype bf16 --steps 1 --json >"$dir/json"
grep -q '"mfu"' "$dir/json" || fail "bench train has no mfu"

# ---- the lab: what looks into tensors says so
code=0
"$emulated" lab run averaging --device cuda --out "$dir/lab" 2>"$dir/err" || code=$?
{ [ $code = 6 ] && grep -q 'on the CPU' "$dir/err"; } || fail "lab run averaging on the GPU gave $code"
"$emulated" lab list | grep -q '^mha-grid.* \*$' || fail "the list does not say what runs on a GPU"

# ---- the ordinary command on a machine without a GPU
if "$tril" version | grep -q 'sm_'; then
    echo "cuda: all good (there is a GPU here: its absence was not tested)"
    exit 0
fi
for command in "attention --qkv $in --out $dir/x" "bench attention" "bench decode" "lab run mha-grid --out $dir/lab" "eval --model $model --data $dir/text.txt" \
    "generate --model $model --prompt a" "inspect --shapes --model $model" "inspect attention --model $model --prompt a" \
    "train --data $dir/text.txt --tokenizer $dir/tok.json --layers 1 --dim 16 --heads 2 --out $dir/x"; do
    code=0
    # shellcheck disable=SC2086 # several words
    "$tril" $command --device cuda >"$dir/stdout" 2>"$dir/err" </dev/null || code=$?
    if [ $code != 6 ] || ! grep -q 'CUDA\|GPU' "$dir/err" || [ "$(wc -l <"$dir/err")" -ne 1 ]; then
        cat "$dir/err" >&2
        fail "$command --device cuda without a GPU gave exit code $code"
    fi
done
echo "cuda: all good"
