#!/usr/bin/env bash
# The whole way from the command line: train, stop, resume, evaluate, generate. A run that was killed
# and resumed must leave the same bytes as one that was not.
set -euo pipefail
tril=$1
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
export TRIL_CACHE=$dir/cache
fail() {
    echo "FAILED: $*" >&2
    exit 1
}
same() { cmp -s "$1" "$2" || fail "$1 and $2 differ"; }

# A text with some structure: 3000 sentences.
awk 'BEGIN { srand(7); split("the cat dog bird sun river old tree sings sleeps runs sees a small red", w, " ")
    for (i = 0; i < 3000; i++) { n = 4 + int(rand() * 6); s = ""
        for (k = 0; k < n; k++) s = s w[1 + int(rand() * 15)] " "
        print s "and then the end." } }' >"$dir/text.txt"

common=(--data "$dir/text.txt" --tokenizer "$dir/tok.json" --layers 2 --dim 32 --heads 4 --batch 4 --seq 32
    --steps 12 --eval-every 4 --checkpoint-every 4 --dropout 0.1 --grad-accum 2 --lr 3e-3 --threads 2)
"$tril" tokenizer train --vocab 300 --special '<|endoftext|>' --out "$dir/tok.json" "$dir/text.txt" 2>/dev/null

# ---- training, and that it repeats
"$tril" train "${common[@]}" --out "$dir/a" --quiet
"$tril" train "${common[@]}" --out "$dir/b" --quiet
same "$dir/a/model.safetensors" "$dir/b/model.safetensors"
for f in config.json tokenizer.json tokenizer_config.json generation_config.json log.jsonl loss.svg \
    checkpoints/step-12/optimizer.safetensors checkpoints/step-12/trainer_state.json; do
    [ -s "$dir/a/$f" ] || fail "$f was not written"
done
[ "$(wc -l <"$dir/a/log.jsonl")" = 12 ] || fail "the log does not have one line a step"
grep -q '"loss":.*"lr":.*"grad_norm":.*"tokens_per_s":' "$dir/a/log.jsonl" || fail "the log lacks fields"

# ---- killed without warning after a checkpoint, then resumed: the same bytes
rm -rf "$dir/c"
"$tril" train "${common[@]}" --out "$dir/c" --quiet --steps 100000 &
pid=$!
for _ in $(seq 600); do
    [ -d "$dir/c/checkpoints/step-8" ] && break
    sleep 0.05
done
kill -9 $pid
wait $pid 2>/dev/null || true
[ -d "$dir/c/checkpoints" ] || fail "no checkpoint was written in time"
"$tril" train --resume --out "$dir/c" --steps 5 --quiet 2>/dev/null || true # nothing to do: fine
# The rate depends on the number of steps, so the comparison uses a constant one.
for name in whole parts; do
    "$tril" train "${common[@]}" --schedule constant --out "$dir/$name" --quiet \
        --steps "$([ $name = whole ] && echo 12 || echo 8)"
done
"$tril" train --resume --out "$dir/parts" --steps 12 --quiet
same "$dir/whole/model.safetensors" "$dir/parts/model.safetensors"
same "$dir/whole/checkpoints/step-12/optimizer.safetensors" "$dir/parts/checkpoints/step-12/optimizer.safetensors"

# ---- SIGINT: a checkpoint, exit code 8, then on
"$tril" train "${common[@]}" --out "$dir/d" --quiet --steps 100000 2>"$dir/err" &
pid=$!
for _ in $(seq 600); do
    [ -s "$dir/d/log.jsonl" ] && break
    sleep 0.05
done
kill -INT $pid
code=0
wait $pid || code=$?
[ $code = 8 ] || fail "SIGINT gave exit code $code"
grep -q -- '--resume' "$dir/err" || fail "the message does not say how to go on"
ls "$dir"/d/checkpoints/step-* >/dev/null || fail "SIGINT left no checkpoint"
if "$tril" train --resume --out "$dir/d" --batch 2 --quiet 2>"$dir/err"; then
    fail "another batch size was accepted on resume"
fi
grep -q -- '--batch' "$dir/err" || fail "the refusal does not name --batch"

# ---- evaluation
"$tril" eval --model "$dir/a" --data "$dir/text.txt" --json >"$dir/eval.json"
for key in loss perplexity bits_per_byte tokens; do
    grep -q "\"$key\"" "$dir/eval.json" || fail "eval lacks $key"
done
"$tril" eval --model "$dir/a" --ids "1 2 3 4" --logits "$dir/l.safetensors" --grads "$dir/g.safetensors" >/dev/null
for f in l g; do [ -s "$dir/$f.safetensors" ] || fail "no logits or gradients"; done

# ---- generation: the same seed gives the same text, streaming prints prompt and continuation
"$tril" generate --model "$dir/a" --prompt "the cat" --max-tokens 12 --seed 5 --json >"$dir/1.json"
"$tril" generate --model "$dir/a" --prompt "the cat" --max-tokens 12 --seed 5 --json >"$dir/2.json"
[ "$(grep -v '_ms\|_per_s' "$dir/1.json")" = "$(grep -v '_ms\|_per_s' "$dir/2.json")" ] || fail "the same seed gave another text"
"$tril" generate --model "$dir/a" --prompt "the cat" --max-tokens 12 --greedy --kv-dtype q8 --quiet | grep -q '^the cat' || fail "no text from a cache of 8 bits"
code=0
"$tril" generate --model "$dir/a" --prompt a --kv-dtype q8 --stream-window 8 2>"$dir/err" || code=$?
{ [ $code = 2 ] && grep -q 'dtype' "$dir/err"; } || fail "a stream with a cache of 8 bits"
"$tril" generate --model "$dir/a" --prompt "the cat" --max-tokens 4 --greedy --quiet | grep -q '^the cat' || fail "no prompt in the stream"
for key in text tokens ttft_ms tokens_per_s; do
    grep -q "\"$key\"" "$dir/1.json" || fail "generate lacks $key"
done

# ---- going on from a model
"$tril" train --model "$dir/a" --data "$dir/text.txt" --out "$dir/e" --batch 2 --seq 16 --steps 2 --quiet
[ -s "$dir/e/model.safetensors" ] || fail "training from a model wrote nothing"
echo "pipeline: all good"
