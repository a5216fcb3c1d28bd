#!/usr/bin/env bash
# Installs tril into a folder and builds a small program against it, once with nothing but
# pkg-config and once with CMake's find_package.
set -euo pipefail
build=$(cd "$(dirname "$1")" && pwd)
cache() { sed -n "s/^$1:[A-Z]*=//p" "$build/CMakeCache.txt"; }
if [ "$(cache TRIL_SANITIZE)" = ON ] || [ "$(cache TRIL_THREAD_SANITIZER)" = ON ]; then
    echo "skipped: a sanitized library is not for installing"
    exit 77
fi

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cmake --install "$build" --prefix "$folder/usr" >/dev/null

cat >"$folder/user.c" <<'END'
#include <stdio.h>
#include <tril/error.h>
int main(void) {
    return puts(tril_status_text(TRIL_ERR_MEMORY)) < 0;
}
END

pc=$(find "$folder/usr" -name tril.pc)
PKG_CONFIG_PATH=$(dirname "$pc")
export PKG_CONFIG_PATH
read -ra flags < <(pkg-config --cflags --libs --static tril)
"$(cache CMAKE_C_COMPILER)" -o "$folder/user" "$folder/user.c" "${flags[@]}"
[ "$("$folder/user")" = "not enough memory" ]

# The example of the documentation: one operation, nothing else of tril.
source=$(cd "$(dirname "$0")/../.." && pwd)/docs/examples/attention.c
"$(cache CMAKE_C_COMPILER)" -Wall -Werror -o "$folder/attention" "$source" "${flags[@]}"
"$folder/attention" >"$folder/said"
grep -q '^refused: attention: 4 query heads are not a multiple of 3' "$folder/said"
# (the difference over a step of 0.01 is off by the curvature times half of it)
awk '/^dsink/ { d = $3 - $6; found = d * d < 0.05 * 0.05 } END { exit !found }' "$folder/said"

cat >"$folder/CMakeLists.txt" <<'END'
cmake_minimum_required(VERSION 3.25)
project(user LANGUAGES C)
find_package(tril REQUIRED)
add_executable(user user.c)
target_link_libraries(user PRIVATE tril::tril)
END
unset PKG_CONFIG_PATH # the package finds its own tril.pc
cmake -G Ninja -S "$folder" -B "$folder/build" -DCMAKE_PREFIX_PATH="$folder/usr" \
    -DCMAKE_C_COMPILER="$(cache CMAKE_C_COMPILER)" >/dev/null
cmake --build "$folder/build" >/dev/null
[ "$("$folder/build/user")" = "not enough memory" ]
