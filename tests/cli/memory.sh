#!/usr/bin/env bash
# Memory from the command line: training on streams, stopped and resumed, must leave the same bytes;
# generation without end, in memory that does not grow; retrieval.
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
# refuse WORDS ARGUMENT...: must fail with code 2, in one line that holds WORDS
refuse() {
    local words=$1 got=0
    shift
    timeout 60 "$tril" "$@" >"$dir/stdout" 2>"$dir/err" </dev/null || got=$?
    if [ "$got" != 2 ] || ! grep -qi -- "$words" "$dir/err"; then
        cat "$dir/err" >&2
        fail "tril $* gave exit code $got (wanted 2, '$words')"
    fi
}

awk 'BEGIN { srand(7); split("the cat dog bird sun river old tree sings sleeps runs sees a small red", w, " ")
    for (i = 0; i < 2000; i++) { n = 4 + int(rand() * 6); s = ""
        for (k = 0; k < n; k++) s = s w[1 + int(rand() * 15)] " "
        print s "and then the end." } }' >"$dir/text.txt"
"$tril" tokenizer train --vocab 300 --special '<|endoftext|>' --out "$dir/tok.json" "$dir/text.txt" 2>/dev/null
train=(train --data "$dir/text.txt" --tokenizer "$dir/tok.json" --layers 2 --dim 32 --heads 4 --batch 4
    --context 128 --seq 16 --schedule constant --checkpoint-every 4 --eval-every 4 --grad-accum 2 --order streams
    --threads 2 --quiet)

# ---- streams: what rows carry is part of a checkpoint
for m in "recurrence segment=16 keep=24" "memory segment=16 keep=40 top=4/chunk:16"; do
    position=none
    [[ $m == memory* ]] && position=rope
    rm -rf "$dir/whole" "$dir/parts"
    "$tril" "${train[@]}" --position $position --mixers "$m" --out "$dir/whole" --steps 8
    "$tril" "${train[@]}" --position $position --mixers "$m" --out "$dir/parts" --steps 4
    "$tril" "${train[@]}" --position $position --mixers "$m" --out "$dir/parts" --steps 8 --resume
    same "$dir/whole/model.safetensors" "$dir/parts/model.safetensors"
    same "$dir/whole/checkpoints/step-8/carry.safetensors" "$dir/parts/checkpoints/step-8/carry.safetensors"
    "$tril" eval --model "$dir/whole" --data "$dir/text.txt" --seq 96 --max-tokens 900 --json >"$dir/eval"
    "$tril" generate --model "$dir/whole" --prompt "the cat" --max-tokens 40 --ignore-eos --quiet >/dev/null
done
refuse "seq 16" "${train[@]}" --position none --mixers "recurrence segment=16" --out "$dir/x" --steps 2 --seq 32
refuse "learned positions" "${train[@]}" --position learned --mixers "recurrence segment=16" --out "$dir/x" --steps 2
refuse "exclude each other" "${train[@]}" --mask-documents --out "$dir/x" --steps 2

# ---- without end: 10 times the context, and no more memory than for one
"$tril" "${train[@]}" --position rope --out "$dir/m" --steps 20 --seq 64 --order shuffled
peak() { # tokens: the largest resident set of a run, in KB
    "$tril" generate --model "$dir/m" --prompt "the cat" --max-tokens "$1" --ignore-eos --quiet --stream-window 60 \
        --sinks 4 --threads 1 --json >"$dir/json" &
    local pid=$! most=0 now
    while now=$(awk '/VmHWM/ { print $2 }' /proc/$pid/status 2>/dev/null) && [ -n "$now" ]; do most=$now; done
    wait $pid
    echo "$most"
}
short=$(peak 1300)
long=$(peak 13000)
grep -q '"finish": *"length"' "$dir/json" || fail "the stream ended early"
# The tokens and the text themselves: under 2 MB for 11,700 tokens and their JSON.
[ $((long - short)) -lt 3000 ] || fail "memory grew from $short to $long KB"
"$tril" generate --model "$dir/m" --prompt "the cat" --max-tokens 300 --ignore-eos --json --greedy >"$dir/json"
grep -q '"finish": *"context"' "$dir/json" || fail "without a stream the context must end generation"
# Until the window is full a stream is nothing else.
for extra in "" "--stream-window 120 --sinks 4 --stream-stride 1"; do
    # shellcheck disable=SC2086
    "$tril" generate --model "$dir/m" --prompt "the cat" --max-tokens 100 --ignore-eos --greedy --quiet $extra >"$dir/text$extra"
done
same "$dir/text" "$dir/text--stream-window 120 --sinks 4 --stream-stride 1"
refuse "context" generate --model "$dir/m" --prompt a --stream-window 128 --sinks 4
refuse "stream" generate --model "$dir/m" --prompt a --sinks 4
refuse "stream" generate --model "$dir/m" --prompt a --retrieve 4 --stream-window 60

# ---- retrieval
"$tril" generate --model "$dir/m" --prompt "the cat" --max-tokens 100 --ignore-eos --greedy --json --retrieve 4 \
    --retrieve-check >"$dir/json"
grep -q '"found": *\(1\.0\|0\.99999\)' "$dir/json" || fail "all blocks are not all of the attention: $(cat "$dir/json")"
echo ok
