#!/usr/bin/env bash
# tril inspect: what it counts, looks at and draws; what it refuses, in a sentence.
set -euo pipefail
tril=$1
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
out=$dir/out.svg

# refuse CODE WORDS ARGUMENT...: must fail with CODE, in one line that holds WORDS, and write nothing
refuse() {
    local code=$1 words=$2 got=0
    shift 2
    timeout 60 "$tril" "$@" >"$dir/stdout" 2>"$dir/err" </dev/null || got=$?
    if [ "$got" != "$code" ] || ! grep -qi -- "$words" "$dir/err" || [ "$(wc -l <"$dir/err")" -ne 1 ] ||
        [ -e "$out" ]; then
        echo "FAILED: tril $* gave exit code $got (wanted $code, '$words'):" >&2
        cat "$dir/err" >&2
        exit 1
    fi
}
# holds FILE WORDS...
holds() {
    local file=$1 word
    shift
    for word in "$@"; do
        grep -qF -- "$word" "$file" || {
            echo "FAILED: $file lacks '$word':" >&2
            head -c 2000 "$file" >&2
            exit 1
        }
    done
}

# ---- attention
tiny=(--preset nano --layers 2 --heads 3 --dim 24 --context 32)
look=(inspect attention "${tiny[@]}")
"$tril" "${look[@]}" --ids "1 2 3 4 5" --out "$dir/a.safetensors" --svg "$dir/all.svg" --html "$dir/a.html" >"$dir/table"
holds "$dir/table" layer.head entropy 0.0 1.2
holds "$dir/a.safetensors" layer.0.scores layer.1.weights layer.1.mask layer.0.lse ids
[ "$(grep -c 'added' "$dir/a.safetensors" || true)" = 0 ]
holds "$dir/all.svg" '<svg' 'Attention of 6 heads over 5 tokens' '>1.2<'
holds "$dir/a.html" 'id="layer-1"' 'id="thumbs"' '</html>'
# scores and weights fp32, the mask a byte: 3 heads x 25 cells x 9 bytes, lse 3 x 5 x 4; twice; ids
bytes=$((2 * (3 * 25 * 9 + 60) + 20))
header=$(od -An -tu8 -N8 "$dir/a.safetensors" | tr -d ' ')
[ "$(stat -c %s "$dir/a.safetensors")" = $((8 + header + bytes)) ]
"$tril" "${look[@]}" --ids "1 2 3 4 5" --layer 1 --head 2 --svg "$dir/one.svg" --out "$dir/b.safetensors" --json >"$dir/one.json"
holds "$dir/one.svg" 'scaled QK' mask softmax '#4'
holds "$dir/one.json" '"weights"' '"mask"' '"scores"' '"entropy"' '"isa"'
[ "$(grep -c '"head"' "$dir/one.json")" = 1 ]
# a row of weights adds up to one
sed -n '/"weights"/,$p' "$dir/one.json" | tr -d '[],"a-z:{} ' | awk '
    NF { sum += $1; n++ }
    END { if (n != 25 || sum < 4.99999 || sum > 5.00001) { print "FAILED: " n " weights add up to " sum; exit 1 } }'
# what a pass says does not depend on what is written of it, or on the implementation below bf16
"$tril" "${look[@]}" --ids "1 2 3 4 5" --layer 1 --head 2 --device reference --json >"$dir/reference.json"
paste <(tr -d ' ,' <"$dir/one.json") <(tr -d ' ,' <"$dir/reference.json") | awk '
    $1 ~ /^-?[0-9.e-]+$/ && ($1 - $2 > 1e-5 || $2 - $1 > 1e-5) { print "FAILED: " $0; exit 1 }'
printf 'nothing' | "$tril" "${look[@]}" --ids "3 1" --mixers "window:2 softcap=3" --position alibi --out "$dir/c.safetensors" >/dev/null
holds "$dir/c.safetensors" layer.0.added
if command -v rsvg-convert >/dev/null; then
    "$tril" "${look[@]}" --ids "1 2 3" --png "$dir/p.png" >/dev/null
    [ "$(head -c 4 "$dir/p.png" | tail -c 3)" = PNG ] && [ ! -e "$dir/p.png.svg" ]
fi
"$tril" inspect attention --help | grep -q Examples

refuse 2 'one text' "${look[@]}" --svg "$out"
refuse 2 'one text' "${look[@]}" --ids 1 --prompt x --svg "$out"
refuse 2 'tokenizer' "${look[@]}" --prompt x --svg "$out"
refuse 2 'layer 2' "${look[@]}" --ids 1 --layer 2 --svg "$out"
refuse 2 'head 3' "${look[@]}" --ids 1 --layer 0 --head 3 --svg "$out"
refuse 2 'token id' "${look[@]}" --ids 'a b' --svg "$out"
refuse 2 'vocabulary' "${look[@]}" --ids 99999999 --svg "$out"
refuse 2 'at least one token' "${look[@]}" --ids ' ' --svg "$out"
refuse 2 'context' "${look[@]}" --ids "$(seq 1 33 | tr '\n' ' ')" --svg "$out"
refuse 2 'switched off' "${look[@]}" --ids 1 --ablate mlpp --svg "$out"
refuse 2 'name one model' inspect attention --ids 1 --svg "$out"
refuse 3 'nowhere' "${look[@]}" --prompt-file "$dir/nowhere"
refuse 3 'no/such' "${look[@]}" --ids 1 --html "$dir/no/such.html"
refuse 2 'no softmax' "${look[@]}" --ids 1 --mixers linear --layer 0 --head 0 --svg "$out"
refuse 2 'no softmax' "${look[@]}" --ids "1 2" --ablate attention:1 --layer 1 --out "$out"
refuse 2 '2048 tokens' inspect attention --preset nano --layers 1 --heads 1 --dim 8 --context 3000 --ids "$(seq 1 2100 | awk '{ print $1 % 50 }' | tr '\n' ' ')" --html "$out"
refuse 2 'did you mean' "${look[@]}" --idz 1

# ---- shapes, parameters, heads, weights, smoothing, ablations
"$tril" inspect --preset model3 --dim 128 --heads 4 --shapes >"$dir/shapes"
holds "$dir/shapes" '8 x 4 x 32' '128 -> 4 x 32 -> 128'
"$tril" inspect --preset model3 --dim 128 --by-heads --json >"$dir/heads.json"
[ "$(grep '"parameters"' "$dir/heads.json" | sort -u | wc -l)" = 1 ]
[ "$(grep -c '"heads": [0-9]' "$dir/heads.json")" = 8 ]
[ "$(grep '"scores"' "$dir/heads.json" | sort -u | wc -l)" = 8 ]
model=$(cd "$(dirname "${BASH_SOURCE[0]}")/../golden/models" && pwd)/gpt2-tiny
"$tril" inspect --model "$model" --weights --csv "$dir/w.csv" --svg "$dir/w.svg" >"$dir/weights"
holds "$dir/weights" kurtosis spectral wte
holds "$dir/w.csv" stable_rank wpe
holds "$dir/w.svg" '<svg' 'layer 0'
refuse 2 'checkpoint' inspect --preset nano --weights
ids="1 5 9 2 8 3 7 4"
"$tril" inspect smoothing --model "$model" --ids "$ids" --svg "$dir/s.svg" --csv "$dir/s.csv" >"$dir/s"
holds "$dir/s" embeddings similarity
holds "$dir/s.csv" residual entropy
"$tril" inspect smoothing --model "$model" --ids "$ids" --ablate attention --json >"$dir/s.json"
[ "$(grep -c entropy "$dir/s.json")" = 0 ]
refuse 2 'two tokens' inspect smoothing --model "$model" --ids 3
refuse 2 'one text' inspect smoothing --model "$model"
"$tril" eval --model "$model" --ids "$ids" --json >"$dir/whole"
for part in mlp attention layer:0 head:1.0 residual norm norm:final q scale position mlp:0,q:1; do
    "$tril" eval --model "$model" --ids "$ids" --ablate "$part" --json >"$dir/part"
    if cmp -s "$dir/whole" "$dir/part"; then
        echo "FAILED: --ablate $part changes nothing"
        exit 1
    fi
done
refuse 2 'switched off' eval --model "$model" --ids "$ids" --ablate everything
refuse 2 'its layers are' eval --model "$model" --ids "$ids" --ablate layer:99
refuse 6 'inference alone' eval --model "$model" --ids "$ids" --ablate mlp --grads "$out"
refuse 2 'which layer' generate --model "$model" --prompt x --ablate layer

echo "inspect: all good"
