#!/usr/bin/env bash
# tril lab: the list, a run with its files, the report, and what is refused.
set -euo pipefail
tril=$1
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT

refuse() { # refuse CODE WORDS ARGUMENT...
    local code=$1 words=$2 got=0
    shift 2
    "$tril" lab "$@" >/dev/null 2>"$dir/err" || got=$?
    if [ "$got" != "$code" ] || ! grep -qi -- "$words" "$dir/err" || [ "$(wc -l <"$dir/err")" -ne 1 ]; then
        echo "FAILED: tril lab $* gave exit code $got (wanted $code, '$words'):" >&2
        cat "$dir/err" >&2
        exit 1
    fi
}

"$tril" lab list | grep -q '^averaging'
"$tril" lab list --json | grep -q '"name": "leak"'
"$tril" lab --help | grep -q Examples
"$tril" lab run averaging --out "$dir/out" >"$dir/text"
for words in 'Published, and here' 'softmax' 'threads'; do grep -q "$words" "$dir/text"; done
"$tril" lab run averaging --out "$dir/out" --json >"$dir/json"
cmp <(grep -v '"when"\|"seconds"\|"peak_flops"\|"load"' "$dir/json" | grep .) \
    <(grep -v '"when"\|"seconds"\|"peak_flops"\|"load"' "$dir/out/averaging/result.json" | grep .)
head -1 "$dir/out/averaging/sharpness.csv" | grep -q 'largest weight'
grep -q '<svg' "$dir/out/averaging/effective.svg"
"$tril" lab report --out "$dir/out" | grep -q '1 experiments'
grep -q "id='averaging'" "$dir/out/report.html"
grep -q '^| softmax | 2 |' "$dir/out/report.md"
grep -q '^!\[.*\](averaging/effective.svg)' "$dir/out/report.md"

refuse 2 'list, run' show
refuse 2 'list, run'
refuse 2 'name the experiments' run
refuse 2 'no experiment' run nothing --out "$dir/out"
refuse 2 'one of --quick' run averaging --quick --full --out "$dir/out"
refuse 2 'no results' report --out "$dir"
refuse 3 '/proc/no' run averaging --out /proc/no/such
echo "lab: all good"
