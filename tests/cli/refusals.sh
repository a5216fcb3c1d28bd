#!/usr/bin/env bash
# Bad input: one sentence on stderr, a documented exit code, nothing lost.
set -euo pipefail
tril=$1
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
export TRIL_CACHE=$dir/cache
# refuse CODE WORDS COMMAND...: the command must fail with CODE, in one line that holds WORDS
refuse() {
    local code=$1 words=$2 got=0
    shift 2
    timeout 60 "$@" >"$dir/out" 2>"$dir/err" </dev/null || got=$?
    if [ "$got" != "$code" ] || ! grep -qi -- "$words" "$dir/err" || [ "$(wc -l <"$dir/err")" -gt 2 ]; then
        echo "FAILED: $* gave exit code $got (wanted $code, '$words'):" >&2
        cat "$dir/err" >&2
        exit 1
    fi
}
seq 1 4000 | sed 's/^/number /' >"$dir/text.txt"
: >"$dir/empty.txt"
head -c 100000 /dev/urandom >"$dir/junk.bin"
train=("$tril" train --out "$dir/m" --vocab 300 --layers 1 --dim 16 --heads 2 --batch 2 --seq 16 --steps 2 --quiet)
"${train[@]}" --data "$dir/text.txt"

refuse 2 'unknown option' "$tril" train --dta x
refuse 2 'did you mean' "$tril" generate --promt x
refuse 2 'no command' "$tril" fly
refuse 2 'whole number' "$tril" train --batch many
refuse 2 'from 1 to' "$tril" train --batch 0
refuse 2 '--out' "$tril" train --data "$dir/text.txt"
refuse 2 '--data' "$tril" train --out "$dir/x"
refuse 3 'nowhere.txt' "${train[@]}" --data "$dir/nowhere.txt"
refuse 2 'preset' "${train[@]}" --data "$dir/text.txt" --preset gpt9
refuse 2 'heads' "${train[@]}" --data "$dir/text.txt" --heads 3
refuse 2 'exclude' "${train[@]}" --data "$dir/text.txt" --epochs 1
refuse 4 'empty' "${train[@]}" --data "$dir/empty.txt"
# The model that was there is still whole.
"$tril" eval --model "$dir/m" --data "$dir/text.txt" --json >/dev/null

refuse 2 'own future' "${train[@]}" --data "$dir/text.txt" --mixers full
refuse 2 'widow' "${train[@]}" --data "$dir/text.txt" --mixers widow:4
refuse 2 'no scores' "${train[@]}" --data "$dir/text.txt" --mixers 'linear softcap=3'
refuse 2 'mixers' "${train[@]}" --data "$dir/text.txt" --mixers causal/linear
refuse 2 'mixers are empty' "${train[@]}" --data "$dir/text.txt" --mixers ''
refuse 2 'mixers are empty' "${train[@]}" --data "$dir/text.txt" --layers 3 --mixers causal//linear
refuse 2 'softcap=' "${train[@]}" --data "$dir/text.txt" --mixers 'softcap=x'
refuse 2 'learned-sinks\|sinks' "$tril" eval --model "$dir/m" --data "$dir/text.txt" --mixers learned-sinks
"$tril" tokenizer train --vocab 400 --out "$dir/larger.json" "$dir/text.txt" >/dev/null
refuse 2 'another tokenizer' "$tril" generate --model "$dir/m" --tokenizer "$dir/larger.json" --prompt x
refuse 2 'would be lost' "$tril" export --model "$dir/m" --out "$dir/m"
refuse 6 'linear attention' "$tril" export --model "$dir/m" --out "$dir/e" --mixers linear
[ ! -e "$dir/e" ]
"$tril" export --model "$dir/m" --out "$dir/e" --mixers linear --native >/dev/null
"$tril" export --model "$dir/m" --out "$dir/b" --dtype bf16 --mixers window:4 | grep -q 'mistral, bf16'
refuse 2 'context' "$tril" eval --model "$dir/m" --ids "$(seq -s ' ' 1 300 | sed 's/[0-9]*/1/g')" --logits "$dir/l"
refuse 2 '299\|300\|vocabulary\|embeddings' "$tril" eval --model "$dir/m" --ids "1 999999" --logits "$dir/l"
refuse 2 'not a token id' "$tril" eval --model "$dir/m" --ids "1 x" --logits "$dir/l"
refuse 3 'no-such-dir' "$tril" eval --model "$dir/no-such-dir" --data "$dir/text.txt"
refuse 3 'no/such' "$tril" eval --model "$dir/m" --ids "1 2" --logits "$dir/no/such/file"
refuse 2 'tokens' "$tril" eval --model "$dir/m" --data "$dir/text.txt" --seq 16 --stride 17

# damaged files, one at a time
damage() {
    rm -rf "$dir/bad"
    cp -r "$dir/m" "$dir/bad"
}
damage
truncate -s -100 "$dir/bad/model.safetensors"
refuse 4 'model.safetensors' "$tril" generate --model "$dir/bad" --prompt x
damage
head -c 100 /dev/zero >"$dir/bad/model.safetensors"
refuse 4 'model.safetensors' "$tril" generate --model "$dir/bad" --prompt x
damage
echo '{"model_type": "llama", ' >"$dir/bad/config.json"
refuse 4 'config.json' "$tril" generate --model "$dir/bad" --prompt x
damage
echo '{}' >"$dir/bad/tokenizer.json"
refuse 4 'tokenizer.json' "$tril" generate --model "$dir/bad" --tokenizer "$dir/bad/tokenizer.json" --prompt x
damage
cp "$dir/junk.bin" "$dir/bad/tokenizer.json"
refuse 4 'tokenizer.json' "$tril" train --model "$dir/bad" --data "$dir/text.txt" --out "$dir/n" --quiet --seq 16 --steps 1
damage
sed -i 's/"step": [0-9]*/"step": "x"/' "$dir"/bad/checkpoints/step-2/trainer_state.json
refuse 4 'trainer_state.json' "$tril" train --resume --out "$dir/bad" --quiet
damage
rm "$dir/bad/tokenizer.json"
refuse 3 'no tokenizer' "$tril" generate --model "$dir/bad" --prompt x --max-tokens 2
damage
echo '{"a":' >"$dir/bad/tokenizer.json"
refuse 4 'tokenizer.json: line' "$tril" generate --model "$dir/bad" --prompt x --max-tokens 2 --json
refuse 2 'no complete checkpoint' "$tril" train --resume --out "$dir/nothing"
refuse 2 'from 0 to 1024' "${train[@]}" --data "$dir/text.txt" --threads 4096
refuse 3 'standard input' bash -c "'$tril' generate --model '$dir/m' --prompt - </"

# An answer that cannot be written is no success.
for command in 'version --json' '--help' "eval --json --model $dir/m --data $dir/text.txt"; do
    # shellcheck disable=SC2086
    refuse 3 'standard output' bash -c "'$tril' $command >/dev/full"
done
"$tril" lab list | head -n 1 >/dev/null

# What is no number is null.
"$tril" eval --model "$dir/m" --ids '1 2 3' --json --logits "$dir/l" >/dev/null
python=$(command -v python3 || true)
if [ -n "$python" ]; then
    damage
    "$python" - "$dir/bad/model.safetensors" <<'END'
import struct, sys
path = sys.argv[1]
data = bytearray(open(path, "rb").read())
begin = 8 + struct.unpack("<Q", data[:8])[0]
data[begin:] = struct.pack("<f", float("nan")) * ((len(data) - begin) // 4)
open(path, "wb").write(data)
END
    "$tril" eval --model "$dir/bad" --data "$dir/text.txt" --json >"$dir/out" || true
    grep -q '"loss": null' "$dir/out" || { echo "FAILED: a loss that is NaN:"; cat "$dir/out"; exit 1; }
fi

# Two trainings do not share a directory, and a new one leaves an earlier one's checkpoints whole.
"$tril" train --data "$dir/text.txt" --out "$dir/two" --vocab 300 --layers 1 --dim 16 --heads 2 --batch 2 --seq 16 \
    --steps 100000 --checkpoint-every 10 --quiet 2>"$dir/err2" &
first=$!
for _ in $(seq 200); do
    [ -d "$dir/two/checkpoints/step-10" ] && break
    sleep 0.1
done
refuse 3 'another process' "${train[@]}" --data "$dir/text.txt" --out "$dir/two"
kill -INT $first
code=0
wait $first || code=$?
[ $code = 8 ] || { echo "FAILED: a signal gave exit code $code"; cat "$dir/err2"; exit 1; }
"${train[@]}" --data "$dir/text.txt" --out "$dir/two" --checkpoint-every 1 --steps 3
[ "$(ls "$dir/two/checkpoints")" = $'step-2\nstep-3' ] || { echo "FAILED: checkpoints are mixed"; exit 1; }
compgen -G "$dir/two/checkpoints.1/step-*" >/dev/null || { echo "FAILED: earlier checkpoints are lost"; exit 1; }
"$tril" train --resume --out "$dir/two" --json | grep -q '"loss": null'

# Binary junk is a text of bytes: it trains, or is refused; it never crashes.
code=0
"${train[@]}" --data "$dir/junk.bin" --out "$dir/j" 2>/dev/null || code=$?
[ $code -lt 126 ] || { echo "FAILED: junk gave $code"; exit 1; }

# a full disk: the earlier checkpoint survives
if [ "$(id -u)" = 0 ] && mkdir "$dir/small" && mount -t tmpfs -o size=300k tmpfs "$dir/small" 2>/dev/null; then
    code=0
    "$tril" train --data "$dir/text.txt" --tokenizer "$dir/m" --out "$dir/small/m" --layers 4 --dim 64 --heads 2 --batch 2 \
        --seq 16 --steps 2 --quiet 2>"$dir/err" || code=$?
    umount "$dir/small"
    [ $code = 3 ] || { echo "FAILED: a full disk gave exit code $code"; cat "$dir/err"; exit 1; }
fi
echo "refusals: all good"
