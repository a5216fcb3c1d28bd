#!/usr/bin/env bash
# The attention page in headless Chromium: it renders, points, picks and obeys the keyboard, and the
# weights it shows are those that tril itself prints.
set -euo pipefail
tril=$1
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
browser=$(command -v chromium || command -v chromium-browser || command -v google-chrome || true)
if [ -z "$browser" ]; then
    echo "skipped: no Chromium"
    exit 77
fi
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT

# visit NAME WIDTH ARGUMENTS...: opens $dir/page.html with the test and prints what it said
visit() {
    local name=$1 width=$2
    shift 2
    if ! timeout 150 "$browser" --headless --no-sandbox --disable-gpu --user-data-dir="$dir/profile" \
        --window-size="$width",900 --virtual-time-budget=20000 --dump-dom "$@" "file://$dir/page.html" \
        >"$dir/dom" 2>"$dir/log"; then
        # A browser that cannot start at all is no fault of the page.
        if ! grep -q '<html' "$dir/dom"; then
            echo "skipped: Chromium does not start here: $(tail -1 "$dir/log")"
            exit 77
        fi
    fi
    sed -n '/<pre id="report">/,/<\/pre>/p' "$dir/dom" | sed 's/<[^>]*>//g' >"$dir/report"
    if ! grep -q '^all good' "$dir/report"; then
        echo "FAILED ($name): "
        head -40 "$dir/report"
        exit 1
    fi
    echo "$name: $(grep -c '^ok' "$dir/report") checks, ready after $(sed -n 's/^ready //p' "$dir/report") ms"
}

# page LAYER HEAD ARGUMENTS...: writes the page, with tril's own numbers of one head and the test in it
page() {
    local layer=$1 head=$2
    shift 2
    "$tril" inspect attention "$@" --html "$dir/plain.html" >/dev/null
    "$tril" inspect attention "$@" --layer "$layer" --head "$head" --json >"$dir/due.json"
    {
        sed '$d' "$dir/plain.html" | sed '$d' # </body>, </html>
        printf '<script>const due = '
        cat "$dir/due.json"
        printf ', layer = %s, head = %s;\n' "$layer" "$head"
        cat "$here/attention_test.js"
        printf '</script></body></html>\n'
    } >"$dir/page.html"
}

tiny=(--preset nano --layers 3 --heads 4 --dim 32 --context 64 --ids "5 9 14 3 3 20 31 7 9 14 40 2 5 9 14 61 8 33 17 25")
page 1 2 "${tiny[@]}"
visit "plain" 1280
visit "phone" 500
visit "dark" 1280 --force-dark-mode
page 2 1 "${tiny[@]}" --mixers "window:4+sinks:1 softcap=5/linear/causal learned-sinks" --position alibi --dtype bf16
visit "rules, softcap, ALiBi, a linear layer" 1280
page 1 1 "${tiny[@]}" --kv-heads 2 --mixers "causal/recurrence segment=6 keep=4/memory segment=6 keep=6 top=2"
visit "relative positions" 1280
# As large as it must be: 12 layers, 12 heads, 512 tokens; queries and keys are then fp16.
ids=$(seq 1 512 | awk '{ print ($1 * 37) % 61 }' | tr '\n' ' ')
large=(--preset nano --layers 12 --heads 12 --dim 768 --context 512 --ids "$ids")
page 7 11 "${large[@]}"
"$tril" inspect attention "${large[@]}" --layer 7 --head 11 --out "$dir/large.safetensors" >/dev/null
# Some of its weights, from the file: ids [512] and scores [512, 512] stand before them.
start=$((8 + $(od -An -tu8 -N8 "$dir/large.safetensors") + 4 * 512 + 4 * 512 * 512))
cells=''
for cell in '511 0' '511 511' '510 509' '256 1' '0 0' '5 5' '7 4'; do
    read -r i j <<<"$cell"
    weight=$(od -An -tf4 -N4 -j $((start + 4 * (i * 512 + j))) "$dir/large.safetensors")
    cells+="[$i, $j, $weight],"
done
sed -i "s/^<script>const due = /<script>const some = [$cells]; const due = /" "$dir/page.html"
visit "12 x 12 x 512" 1280
