#!/usr/bin/env bash
# Draws the masks of docs/attention.md: tools/masks.sh [build/tril]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
tril=${1:-build/tril}
mkdir -p docs/masks
draw() { "$tril" attention --visible "$2" --draw "docs/masks/$1.svg" --size "${3:-24,24}"; }
draw causal causal
draw full full
draw window window:6
draw window-sinks causal+window:6+sinks:2
draw global full+window:3+global:0,12
draw dilated dilated:4,3
draw strided strided:5
draw fixed fixed:6,1
draw chunk chunk:6
draw chunk-full full+chunk:6
draw longer causal 12,24
draw shorter causal 24,12
