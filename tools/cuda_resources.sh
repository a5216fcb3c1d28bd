#!/usr/bin/env bash
# What every kernel of src/cuda takes of a GPU: compiles them with nvcc -Xptxas -v and prints a
# Markdown table (registers, bytes spilled, static shared memory; for each architecture).
#   tools/cuda_resources.sh [-a "80 90a"] [FILE.cu ...]     nvcc from the PATH or /usr/local/cuda/bin
# Kernels that differ only in their template arguments share a line: least to most.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

architectures="80 90a"
if [ "${1:-}" = -a ]; then
    architectures=$2
    shift 2
fi
files=("$@")
[ ${#files[@]} -gt 0 ] || files=(src/cuda/*.cu)
nvcc=$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)
[ -x "$nvcc" ] || {
    echo "nvcc was not found: install the CUDA toolkit" >&2
    exit 1
}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

for file in "${files[@]}"; do
    for a in $architectures; do
        "$nvcc" -std=c++17 "-arch=sm_$a" -Isrc -Iinclude -O3 --expt-relaxed-constexpr \
            -diag-suppress=20012 -Xptxas -v -c "$file" -o "$work/object" 2>"$work/log" || {
            cat "$work/log" >&2
            exit 1
        }
        # A line for every kernel: file, name, architecture, registers, spilled, shared.
        c++filt <"$work/log" | awk -v file="$(basename "$file")" -v a="$a" '
            /Compiling entry function/ {
                split($0, quoted, "\x27")
                name = quoted[2]
                sub(/^void /, "", name)
                sub(/^\(anonymous namespace\)::/, "", name)
                sub(/[<(].*/, "", name)
            }
            /spill stores/ {
                match($0, /[0-9]+ bytes spill stores/)
                spilled = substr($0, RSTART) + 0
                match($0, /[0-9]+ bytes spill loads/)
                spilled += substr($0, RSTART) + 0
            }
            /Used [0-9]+ registers/ {
                match($0, /Used [0-9]+/)
                registers = substr($0, RSTART + 5) + 0
                shared = match($0, /[0-9]+ bytes smem/) ? substr($0, RSTART) + 0 : 0
                print file, name, a, registers, spilled, shared
            }'
    done
done >"$work/kernels"

awk -v architectures="$architectures" '
    function note(at, value) {
        if (!(at in least) || value < least[at]) least[at] = value
        if (!(at in most) || value > most[at]) most[at] = value
    }
    function range(at) {
        if (!(at in least)) return "-"
        return least[at] == most[at] ? least[at] : least[at] " to " most[at]
    }
    {
        kernel = $1 " | `" $2 "`"
        if (!(kernel in seen)) order[++kernels] = kernel
        seen[kernel] = 1
        variants[kernel, $3]++
        note(kernel SUBSEP $3 SUBSEP "registers", $4)
        note(kernel SUBSEP $3 SUBSEP "spilled", $5)
        note(kernel SUBSEP $3 SUBSEP "shared", $6)
    }
    END {
        count = split(architectures, archs, " ")
        printf "| file | kernel | variants |"
        for (i = 1; i <= count; i++)
            printf " sm_%s: registers | spilled bytes | shared bytes |", archs[i]
        printf "\n|---|---|---|"
        for (i = 1; i <= count; i++) printf "---|---|---|"
        printf "\n"
        for (k = 1; k <= kernels; k++) {
            printf "| %s | %d |", order[k], variants[order[k], archs[1]]
            for (i = 1; i <= count; i++) {
                at = order[k] SUBSEP archs[i] SUBSEP
                printf " %s | %s | %s |", range(at "registers"), range(at "spilled"), range(at "shared")
            }
            printf "\n"
        }
    }' "$work/kernels"
