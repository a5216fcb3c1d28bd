#!/usr/bin/env bash
# Checks what the compiler does not: formatting, the arrows between the rooms, sizes, stray paths and
# marks, shell scripts. Prints every fault and exits 1 if there is one. (./run lint)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

# Formatting differs between versions: take the one that Debian 12 has, wherever it is installed.
formatter=$(command -v clang-format-14 || command -v clang-format)
if [ "${1:-}" = --clang-format ]; then
    echo "$formatter"
    exit
fi

faults=0
fault() {
    printf '%s\n' "$*"
    faults=$((faults + 1))
}

# Tracked files that match the patterns and exist.
tracked() {
    git ls-files -- "$@" | while IFS= read -r file; do [ -f "$file" ] && printf '%s\n' "$file"; done
}

# ---- formatting
if [ -n "$formatter" ]; then
    tracked '*.c' '*.h' '*.cu' '*.cuh' '*.cpp' | xargs -r -d '\n' "$formatter" --dry-run -Werror ||
        fault "formatting: run ./run format"
else
    fault "formatting: clang-format is not installed"
fi

# ---- the arrows (CONTRIBUTING.md): which rooms a room may include from
declare -A rooms
rooms[base]='base'
rooms[ops]="${rooms[base]} ops"
rooms[cpu]="${rooms[ops]} cpu"
rooms[cuda]="${rooms[ops]} cuda"
rooms[text]="${rooms[base]} text"
rooms[formats]="${rooms[base]} formats"
rooms[plot]="${rooms[base]} plot"
rooms[dist]="${rooms[base]} dist"
rooms[model]="${rooms[ops]} formats model"
rooms[train]="${rooms[model]} text dist plot train"
rooms[infer]="${rooms[model]} text dist plot infer"
rooms[lab]="${rooms[train]} infer lab"
rooms[api]="${rooms[lab]} cpu cuda api"

for room in "${!rooms[@]}"; do
    allowed=" ${rooms[$room]} "
    while IFS=: read -r file line target; do
        case $target in
        tril/tril.h) [ "$room" = api ] || fault "$file:$line: only src/api includes $target" ;;
        tril/*) ;; # the words of errors and configurations are everybody's
        */*)
            from=${target%%/*}
            case $allowed in
            *" $from "*) ;;
            *) fault "$file:$line: $room may not include $target" ;;
            esac
            ;;
        *) fault "$file:$line: say which room \"$target\" is in" ;;
        esac
    done < <(tracked "src/$room/*" | xargs -r -d '\n' grep -HnE '^[[:space:]]*#[[:space:]]*include[[:space:]]*"' |
        sed -E 's/^([^:]*:[^:]*):[^"]*"([^"]*)".*/\1:\2/')
done

# The command and the server know the public headers and their own files only.
while IFS=: read -r file line target; do
    case $target in
    tril/*) ;;
    */*) fault "$file:$line: ${file%%/*} includes tril/ headers only, not $target" ;;
    *) [ -f "${file%/*}/$target" ] || fault "$file:$line: there is no $target beside it" ;;
    esac
done < <(tracked 'cli/*' 'server/*' | xargs -r -d '\n' grep -HnE '^[[:space:]]*#[[:space:]]*include[[:space:]]*"' |
    sed -E 's/^([^:]*:[^:]*):[^"]*"([^"]*)".*/\1:\2/')

# Public headers stand alone.
while IFS= read -r hit; do
    fault "$hit: a public header includes only tril/ headers"
done < <(tracked 'include/*' | xargs -r -d '\n' grep -HnE '^[[:space:]]*#[[:space:]]*include[[:space:]]*"' |
    grep -v '"tril/')

# Processor-specific headers stay in src/cpu.
while IFS= read -r hit; do
    fault "$hit: intrinsics belong in src/cpu"
done < <(tracked '*.c' '*.h' | grep -v '^src/cpu/' |
    xargs -r -d '\n' grep -HnE '#[[:space:]]*include[[:space:]]*<([a-z0-9]*intrin|cpuid|arm_[a-z0-9]+)\.h>')

# ---- sizes
while IFS= read -r file; do
    lines=$(wc -l <"$file")
    [ "$lines" -le 800 ] || fault "$file: $lines lines; over 800 is two rooms"
done < <(tracked '*.c' '*.h' '*.inc' '*.sh' '*.py' '*.cu' '*.cuh' '*.cpp' '*.js' CMakeLists.txt run)
while IFS= read -r file; do
    bytes=$(stat -c %s "$file")
    [ "$bytes" -le 1000000 ] || fault "$file: $bytes bytes; tracked files stay under 1 MB"
done < <(tracked)

# ---- one machine's paths, and unfinished business (the brackets keep this file out of its own net)
while IFS= read -r hit; do
    fault "$hit: a path of one machine"
done < <(tracked | xargs -r -d '\n' grep -HnIE '(^|[^[:alnum:]_.}/-])/(w[o]rk|r[o]ot|t[m]p)/')
while IFS= read -r hit; do
    fault "$hit: finish it, or open an issue"
done < <(tracked | xargs -r -d '\n' grep -HnIwE 'T[O]DO|F[I]XME')

# ---- shell scripts
mapfile -t scripts < <(tracked | xargs -r -d '\n' grep -lIm1 -E '^#!.*\b(ba)?sh$')
if command -v shellcheck >/dev/null; then
    [ ${#scripts[@]} -eq 0 ] || shellcheck "${scripts[@]}" || fault "shellcheck: see above"
else
    fault "shellcheck is not installed"
fi

if [ "$faults" -gt 0 ]; then
    echo "lint: $faults faults"
    exit 1
fi
echo "lint: clean"
