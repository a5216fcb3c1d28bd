#!/usr/bin/env bash
# docs/ladder.md keeps its word: every command in it runs, in order, and draws what it says.
# ladder.sh TRIL [KEEP]: with KEEP, what was made stays in that folder, and the experiments run too
# (otherwise those that cli/lab.sh runs are left out).
set -euo pipefail
tril=$(realpath "$1")
root=$(realpath "$(dirname "$0")/../..")
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
if [ $# -gt 1 ]; then
    mkdir -p "$2"
    dir=$(realpath "$2")
    trap - EXIT
fi
export TRIL_CACHE=$dir/cache
ln -sfn "$root/docs" "$dir/docs"
cd "$dir"
tril() { "$tril" "$@" </dev/null; }
n=0
while IFS= read -r line; do
    if [ $# -lt 2 ] && [[ "$line" == "tril lab run "* ]] && [[ "$line" != *averaging* ]]; then
        continue
    fi
    begun=$SECONDS
    if ! (eval "$line") >out 2>&1; then
        echo "FAILED: $line" >&2
        tail -5 out >&2
        exit 1
    fi
    n=$((n + 1))
    printf '%3d s  %s\n' $((SECONDS - begun)) "$line"
done < <(sed -n 's/^    \(tril\|cat\) /\1 /p' "$root/docs/ladder.md")
for file in head.svg heads.svg causal.svg window.svg attention.html smoothing.svg model/loss.svg; do
    [ -s "$file" ] || { echo "FAILED: no $file" >&2; exit 1; }
done
echo "ladder: $n commands, all good"
