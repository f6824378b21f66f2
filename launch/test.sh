#!/usr/bin/env bash
# Sets up, then every check there is, cheapest first; the first that fails ends it with its exit code.
# Arguments go to every pytest call, as in: launch/test.sh -k sync -x. `launch/test.sh slow` runs the long tests alone.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec </dev/null
chosen=$#

check() { # NAME COMMAND...
    local name=$1 from=$SECONDS rc=0
    shift
    printf '\n== %s\n' "$name"
    "$@" || rc=$?
    ((rc != 5 || chosen == 0)) || rc=0 # pytest: the arguments choose no test of this folder
    ((rc == 0)) || exit "$rc"
    took+="$name $((SECONDS - from)) s, "
}

took="" both=(--numprocesses 2 --dist worksteal)
if [[ ${1:-} == slow ]]; then
    shift
    check "slow tests" pytest tests -m slow --durations=0 "$@"
    exit
fi
check "ruff check" ruff check .
check "ruff format" ruff format --check .
check "conf, launch and docker" pytest tests/files "${both[@]}" "$@"
check "unit tests" pytest tests/unit "${both[@]}" "$@"
check "mypy" mypy --num-workers 2
printf '\n== took: %snow the real stack\n' "$took"
check "real stack" pytest tests/ray --durations=15 "$@"
