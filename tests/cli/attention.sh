#!/usr/bin/env bash
# tril attention: files in and out, every malformed one refused in a sentence, pictures of masks.
# (tests/api/test_attention_golden.c compares its numbers with PyTorch's.)
set -euo pipefail
tril=$1
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
in=$dir/in.safetensors out=$dir/out.safetensors

# tensors FILE "NAME DTYPE BYTES SHAPE"...: a safetensors file of zeros
tensors() {
    local file=$1 at=0 header='{' row name dtype bytes shape end i
    shift
    for row in "$@"; do
        read -r name dtype bytes shape <<<"$row"
        end=$((at + bytes))
        header+="\"$name\":{\"dtype\":\"$dtype\",\"shape\":[$shape],\"data_offsets\":[$at,$end]},"
        at=$end
    done
    header="${header%,}}"
    {
        for i in 0 8 16 24 32 40 48 56; do
            # shellcheck disable=SC2059 # the format is the byte
            printf "\\x$(printf %02x $(((${#header} >> i) & 255)))"
        done
        printf '%s' "$header"
        head -c $at /dev/zero
    } >"$file"
}

# refuse CODE WORDS ARGUMENT...: must fail with CODE, in one line that holds WORDS, and write nothing
refuse() {
    local code=$1 words=$2 got=0
    shift 2
    rm -f "$out"
    timeout 60 "$tril" attention "$@" >"$dir/stdout" 2>"$dir/err" </dev/null || got=$?
    if [ "$got" != "$code" ] || ! grep -qi -- "$words" "$dir/err" || [ "$(wc -l <"$dir/err")" -ne 1 ] ||
        [ -e "$out" ]; then
        echo "FAILED: tril attention $* gave exit code $got (wanted $code, '$words'):" >&2
        cat "$dir/err" >&2
        exit 1
    fi
}

q='q F32 240 1,2,5,6' k='k F32 168 1,1,7,6' v='v F32 168 1,1,7,6' g='do F32 240 1,2,5,6'
run=(--qkv "$in" --out "$out")
tensors "$in" "$q" "$k" "$v" "$g"
for impl in flash fused materialised reference; do
    "$tril" attention "${run[@]}" --impl $impl --grads --probs --json | grep -q "\"implementation\": \"$impl\""
    for name in o lse p dq dk dv; do grep -q "\"$name\"" "$out"; done
done
if grep -q '"dbias"' "$out"; then echo "FAILED: a dbias without a bias"; exit 1; fi
"$tril" attention "${run[@]}" --dtype bf16 --visible 0=window:2 --visible 1=full+sinks:1+global:3 --alibi --scale -1 \
    --softcap 2 --dropout 0.5 --seed 3 >/dev/null
grep -q '"o":{"dtype":"BF16"\|"o": {"dtype": "BF16"' "$out"
"$tril" attention --help | grep -q 'Examples'

refuse 2 'qkv' --out "$out"
refuse 2 'out' --qkv "$in"
refuse 2 'would be lost' --qkv "$in" --out "$in"
refuse 3 'nowhere' --qkv "$dir/nowhere" --out "$out"
refuse 3 'no/such' --qkv "$in" --out "$dir/no/such/file"
refuse 2 'did you mean' "${run[@]}" --visble causal
refuse 2 'one of' "${run[@]}" --impl quick
refuse 2 'one of' "${run[@]}" --dtype int8
refuse 2 'visibility rule' "${run[@]}" --visible windows:3
refuse 2 'window' "${run[@]}" --visible window
refuse 2 'window' "${run[@]}" --visible window:0
refuse 2 'window' "${run[@]}" --visible window:99999999999999999999
refuse 2 'dilated' "${run[@]}" --visible dilated:3
refuse 2 'global' "${run[@]}" --visible global:
refuse 2 'empty' "${run[@]}" --visible ''
refuse 2 'causal or full' "${run[@]}" --visible causal+full
refuse 2 'two visibility rules' "${run[@]}" --visible causal --visible full
refuse 2 'head 1' "${run[@]}" --visible 0=causal
refuse 2 '2 heads' "${run[@]}" --visible 0-7=causal
refuse 4 'tensor blocks' "${run[@]}" --visible blocks
refuse 2 '--block' "${run[@]}" --block 3
refuse 2 '--block' "${run[@]}" --block 0,4
refuse 2 'number' "${run[@]}" --scale nan
refuse 2 'finite' "${run[@]}" --scale 1e200
refuse 2 'number' "${run[@]}" --dropout 1
refuse 2 'number' "${run[@]}" --softcap -1
refuse 2 'as many keys' "${run[@]}" --impl linear

bad() { # bad CODE WORDS TENSORS -- ARGUMENTS
    local code=$1 words=$2 rows=()
    shift 2
    while [ "$1" != -- ]; do
        rows+=("$1")
        shift
    done
    shift
    tensors "$in" "${rows[@]}"
    refuse "$code" "$words" "${run[@]}" "$@"
}
bad 4 'tensor do' "$q" "$k" "$v" -- --grads
bad 4 'no tensor q' "$k" "$v" --
bad 4 'no tensor v' "$q" "$k" --
bad 4 'must be' 'q I32 240 1,2,5,6' "$k" "$v" --
bad 4 'must be' 'q F32 240 1,2,5,6,1' "$k" "$v" --
bad 4 'must be' 'q F32 240 2,5,6' "$k" "$v" --
bad 4 'tensor k' "$q" 'k F32 168 7,1,1,6' "$v" --
bad 4 'tensor v' "$q" "$k" 'v F32 144 1,1,6,6' --
bad 4 'tensor do' "$q" "$k" "$v" 'do F32 120 1,1,5,6' -- --grads
bad 4 'tensor bias' "$q" "$k" "$v" 'bias F32 420 3,5,7' --
bad 4 'tensor bias' "$q" "$k" "$v" 'bias F32 140 5,7' --
bad 4 'tensor sink' "$q" "$k" "$v" 'sink F32 12 3' --
bad 4 'tensor blocks' "$q" "$k" "$v" 'blocks U8 9 3,3' -- --visible blocks --block 4,4
bad 2 'multiple' 'q F32 360 1,3,5,6' 'k F32 336 1,2,7,6' 'v F32 336 1,2,7,6' --
bad 2 'queries is 0' 'q F32 0 1,2,0,6' "$k" "$v" --
bad 2 'batch is 0' 'q F32 0 0,2,5,6' 'k F32 0 0,1,7,6' 'v F32 0 0,1,7,6' --
bad 2 'width is 257' 'q F32 1028 1,1,1,257' 'k F32 1028 1,1,1,257' 'v F32 1028 1,1,1,257' --
bad 4 'overflow' 'q F32 240 4294967296,4294967296,5,6' "$k" "$v" --
tensors "$in" "$q" "$k" "$v"
truncate -s -8 "$in"
refuse 4 'in.safetensors' "${run[@]}"
head -c 4000 /dev/urandom >"$in"
refuse 4 'in.safetensors' "${run[@]}"

# blocks, bias and sink reach their places
tensors "$in" "$q" "$k" "$v" "$g" 'bias F32 140 1,5,7' 'sink F32 8 2' 'blocks U8 4 2,2'
"$tril" attention "${run[@]}" --visible blocks --block 4,4 --grads >/dev/null
for name in dbias dsink; do grep -q "\"$name\"" "$out"; done

# pictures
"$tril" attention --visible fixed:8,2 --draw "$dir/mask.svg" --size 16,24
grep -q '<svg' "$dir/mask.svg"
refuse 2 'drawn' --visible causal --draw "$dir/x.svg" --size 1000,4
refuse 2 '--size' --visible causal --draw "$dir/x.svg" --size 4
refuse 2 'blocks' --visible blocks --draw "$dir/x.svg"

printf 'T,"tril, ms",peer\n64,1.5,3\n128,,9\n256,12,30\n' >"$dir/times.csv"
"$tril" plot --data "$dir/times.csv" --out "$dir/times.svg" --log-x --log-y --title Times
grep -q 'tril, ms' "$dir/times.svg"
printf 'T,a\n64,x\n' >"$dir/times.csv"
code=0
"$tril" plot --data "$dir/times.csv" --out "$dir/x.svg" 2>"$dir/err" || code=$?
[ $code = 4 ] && grep -q 'not a number' "$dir/err"

# the benchmark: its JSON has what it promises
"$tril" bench attention --heads 2 --seq 64 --head-dim 16 --steps 2 --visible window:8 --json >"$dir/bench.json"
for name in forward_ms backward_ms forward_flops_per_s backward_flops_per_s peak_flops extra_bytes bytes_moved block_q; do
    grep -q "\"$name\"" "$dir/bench.json"
done
"$tril" bench attention --heads 2 --seq 200 --head-dim 16 --steps 1 --forward-only --dtype fp32 --block 48,32 --json >"$dir/bench.json"
grep -q '"block_q": *48' "$dir/bench.json"
grep -q '"block_k": *32' "$dir/bench.json"
code=0
"$tril" bench attention --block 48 2>"$dir/err" || code=$?
[ $code = 2 ] && grep -q -- '--block' "$dir/err"
code=0
"$tril" bench attention --heads 3 --kv-heads 2 2>"$dir/err" || code=$?
[ $code = 2 ] && grep -q 'multiple' "$dir/err"
echo "attention: all good"
