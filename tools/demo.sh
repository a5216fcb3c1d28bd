#!/usr/bin/env bash
# ./run demo: a real text, a tokenizer, a small GPT, what it writes before and after. About four
# minutes on two cores; the number of steps follows from this machine's speed. TRIL_DEMO_SECONDS sets
# the training time, TRIL_DEMO_OUT the folder.
set -euo pipefail
tril=${TRIL:-build/tril}
out=${TRIL_DEMO_OUT:-demo-out}
seconds=${TRIL_DEMO_SECONDS:-150}
vocab=4096 batch=8 seq=128

bold='' plain=''
if [ -t 1 ]; then bold=$'\e[1m' plain=$'\e[0m'; fi
title() { printf '\n%s%s%s\n' "$bold" "$*" "$plain"; }
fail() {
    printf '%s\n' "$*" >&2
    exit 1
}
# number KEY < JSON: the first number under that key
number() { sed -n "s/.*\"$1\": *\(-\{0,1\}[0-9.eE+-]*\).*/\1/p" | head -n 1; }

# ---- the text

mkdir -p "$out"
if [ $# -gt 0 ]; then
    data=("$@")
    for file in "$@"; do
        case $file in --*) fail "./run demo takes files of text, not options: ./run demo FILE..." ;; esac
        [ -s "$file" ] || fail "$file is missing or empty; give files of text: ./run demo FILE..."
    done
    prompt=${TRIL_DEMO_PROMPT:-}
    title "Your text: $*"
else
    if ! command -v bible >/dev/null; then
        command -v apt-get >/dev/null ||
            fail "The demo's text comes with Debian's package bible-kjv; give files of your own: ./run demo FILE..."
        title "Installing: bible-kjv bible-kjv-text (the King James Bible, 4 MB of public-domain text)"
        root=()
        [ "$(id -u)" = 0 ] || root=(sudo)
        "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends \
            bible-kjv bible-kjv-text >/dev/null ||
            fail "bible-kjv could not be installed; give files of your own: ./run demo FILE..."
    fi
    # One verse a line; "Ge1:1 " in front of it goes.
    bible -f 'gen1:1-rev22:21' | sed 's/^[0-9]*[A-Za-z]*[0-9]*:[0-9]* //' >"$out/text.txt"
    data=("$out/text.txt")
    prompt=${TRIL_DEMO_PROMPT:-And God said}
    title "The text: the King James Bible, $(wc -w <"$out/text.txt") words"
fi

# ---- how fast is this machine

speed=$("$tril" bench train --preset nano --vocab $vocab --batch $batch --seq $seq --steps 2 --json 2>/dev/null)
rate=$(printf '%s' "$speed" | number tokens_per_s)
steps=$(awk -v r="$rate" -v s="$seconds" -v n=$((batch * seq)) \
    'BEGIN { n = int(s * r / n); if (n < 60) n = 60; if (n > 4000) n = 4000; print n }')
printf 'This machine trains the demo'\''s model at %.0f tokens/s (%s): %s steps of %s tokens.\n' \
    "$rate" "$(printf '%s' "$speed" | sed -n 's/.*"isa": *"\([a-z0-9]*\)".*/\1/p')" "$steps" $((batch * seq))

# ---- before, training, after

rm -rf "$out/model" "$out/before"
title "Tokenizer: byte-level BPE, $vocab tokens, from the text itself"
"$tril" tokenizer train --vocab $vocab --special '<|endoftext|>' --out "$out/tokenizer.json" "${data[@]}"

title "Before training it writes noise"
"$tril" train --init-only --preset nano --tokenizer "$out/tokenizer.json" --out "$out/before" --quiet
"$tril" generate --model "$out/before" --prompt "$prompt" --max-tokens 40 --seed 1 --quiet

title "Training a GPT (the model 'nano')"
"$tril" train --preset nano --data "${data[@]}" --tokenizer "$out/tokenizer.json" \
    --out "$out/model" --batch $batch --seq $seq --steps "$steps" --lr 2e-3 --weight-decay 0.1 \
    --eval-every $((steps / 8 > 0 ? steps / 8 : 1)) --eval-tokens 8192 --checkpoint-every $((steps / 2 > 0 ? steps / 2 : 1))
rm -rf "$out/before"

title "After training it writes"
"$tril" generate --model "$out/model" --prompt "$prompt" --max-tokens 120 --seed 1 --temperature 0.8

title "How good is that?"
"$tril" eval --model "$out/model" --baseline --dtype bf16 --data "${data[@]}" 2>/dev/null

title "What lies where"
cat <<END
  $out/model/            the model: config.json, model.safetensors, tokenizer.json (opens in transformers)
  $out/model/loss.svg    the loss curve$([ -f "$out/model/loss.png" ] && echo ", and as loss.png")
  $out/model/log.jsonl   every step
  $out/model/checkpoints to resume from

${bold}What to try next${plain}
  $tril generate --model $out/model --prompt "In the beginning" --max-tokens 200
  $tril eval --model $out/model --data ${data[0]}
  $tril inspect --model $out/model --shapes
  $tril train --data YOUR.txt --out mine && $tril generate --model mine --prompt "..."
  ./run test
END
