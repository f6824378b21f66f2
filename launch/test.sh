#!/usr/bin/env bash
# Sets up, then runs one lane of the checks; the first that fails ends it with its exit code.
set -euo pipefail

lanes() {
    cat <<'END'
usage: launch/test.sh [LANE] [pytest arguments, as in: launch/test.sh -k sync -x]

  (no lane)  every push: ruff, conf and launch, unit tests, report.html and the site in a browser, kernels interpreted,
             mypy, the real stack on the CPU; installs the extras pages and docs (ENTRORAY_EXTRAS= for none)
  slow       long tests, and assertions that the default lane makes on a smaller run; installs the extras
             wandb, mlflow, pages and docs, unless ENTRORAY_EXTRAS names others (ENTRORAY_EXTRAS= for none)
  families   models of other families than Llama
  faults     the table of tests/faults/README.md: every fault injected, at most an hour; one that was interrupted
             goes on; faults long, with a partition of five minutes and 20 deaths of the driver
  bench      speed and memory against a limit; bench ROW, one row of tests/bench/README.md (8 minutes)
  cluster    more nodes than this one, or what starts them
END
}
case ${1:-} in
-h | --help) lanes && exit ;;
slow | families | faults | bench | cluster) lane=$1 && shift ;;
*) lane="" ;;
esac
[[ -n $lane ]] || export ENTRORAY_EXTRAS=${ENTRORAY_EXTRAS-pages,docs}
[[ $lane != slow ]] || export ENTRORAY_EXTRAS=${ENTRORAY_EXTRAS-wandb,mlflow,pages,docs}
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

browser() { # is there one? root in CI installs it, anybody else is told what is not tested
    local packages=(chromium fonts-noto-color-emoji)
    ! command -v chromium >/dev/null || return 0
    if [[ -n ${CI:-} && $EUID == 0 ]] && command -v apt-get >/dev/null; then
        apt-get -qq update && apt-get -qq install -y --no-install-recommends "${packages[@]}" >/dev/null && return 0
    fi
    printf '\n== NOT TESTED: report.html and the site in a browser; as root: apt-get install -y %s\n' "${packages[*]}"
    return 1
}

one_lane() { # [ROW of bench | long, of faults] PYTEST ARGUMENTS...
    local rc=0 what=tests marked=$lane
    if [[ $lane == bench && ${1:-} =~ ^[a-z][a-z0-9_]*$ ]]; then
        what="tests/bench/test_rows.py::test_row[$1]" && shift
    fi
    if [[ $lane == faults ]]; then
        if [[ ${1:-} == long ]]; then shift; else marked="faults and not long"; fi
    fi
    printf '\n== lane %s\n' "$lane"
    pytest "$what" -m "$marked" --durations=0 "$@" || rc=$?
    ((rc != 5)) || echo "lane $lane: no such test yet"
    [[ $lane != families && $lane != faults ]] || python -m "tests.$lane.table"
    exit $((rc == 5 ? 0 : rc))
}

took="" both=(--numprocesses 2 --dist worksteal)
[[ -z $lane ]] || one_lane "$@"
check "ruff check" ruff check .
check "ruff format" ruff format --check .
check "conf, launch and docker" pytest tests/files "${both[@]}" "$@"
check "unit tests" pytest tests/unit "${both[@]}" "$@"
if browser; then pages=tests/pages; else pages=tests/pages/test_site.py; fi
check "pages" pytest $pages "${both[@]}" "$@"
check "kernels" env TRITON_INTERPRET=1 pytest tests/interpreter "${both[@]}" "$@"
check "mypy" mypy
printf '\n== took: %snow the real stack\n' "$took"
# Modules share what they start, so each stays whole; what reads a clock or looks at the whole machine runs alone.
check "real stack" pytest tests/ray --numprocesses 2 --dist loadfile --durations=15 "$@"
check "real stack, alone" pytest tests/alone tests/faults --durations=15 "$@"
