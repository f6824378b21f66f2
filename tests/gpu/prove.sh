#!/usr/bin/env bash
# Proves on one card what the CPU cannot show, part by part; README.md beside it says what each part is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

usage() {
    cat <<'END'
usage: tests/gpu/prove.sh [--dry] [--again] [--results DIR] PART...
       tests/gpu/prove.sh --unpack

  PART       a: the card and torch   b: the head   c: the body   d: a learner's rank   e: engines
             f: engine and rank over ipc   g: the same over nccl   h: entroray train; or `all`
  --dry      all parts at once with tiny shapes on the CPU, written into a folder that is deleted at the end
  --again    run also what was run on this card at this commit
  --results  where the JSON goes, tests/gpu/results if not given
  --unpack   only take in the pieces that were copied, before the next is copied

A part ends after 60 seconds (d, e: 100, f: 120, h: 150), whatever it has: what it has found by then is kept, and the
next call goes on, also with what was not there for want of a piece.
Python is python3, or what PYTHON names. One without vLLM has the zips of tests/gpu/pieces, which pieces.sh makes,
checked by their SHA256SUMS, unpacked once into tests/gpu/unpacked and put on its path.
A copy without its .git is given its commit by PROOF_COMMIT, which the JSON says.
Exit code: 0, all right; 1, a check is wrong or broke; 2, wrong arguments or a damaged piece; 3, a part ran out of
its time.
END
}

LIMIT=60 DRY_LIMIT=240                    # seconds; two cores may be busy with other tests
declare -A LONGER=([d]=100 [e]=100 [f]=120 [h]=150) # part -> seconds, for parts that start vLLM several times, or the product
folder=tests/gpu
results=$folder/results dry=() again=() parts=() unpack=0
while (($#)); do
    case $1 in
    -h | --help) usage && exit ;;
    --dry) dry=(--dry) ;;
    --again) again=(--again) ;;
    --unpack) unpack=1 ;;
    --results) results=${2:?--results needs a folder} && shift ;;
    all) for each in "$folder"/part_*.py; do each=${each##*part_} && parts+=("${each%.py}"); done ;;
    *) [[ -f $folder/part_$1.py ]] || { echo "prove.sh: there is no part \`$1\`" >&2 && usage >&2 && exit 2; } && parts+=("$1") ;;
    esac
    shift
done
((${#parts[@]} || unpack)) || { usage >&2 && exit 2; }

python=${PYTHON:-python3}
has() { "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)' "$1"; }
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if ((unpack)) || ! has vllm; then
    "$python" -m tests.gpu.pieces --unpack || exit 2
    PYTHONPATH+=:$PWD/$folder/unpacked
fi
((${#parts[@]})) || exit 0
# A machine with the pieces has no flashinfer, which vLLM samples with unless it is told otherwise.
has flashinfer || export VLLM_USE_FLASHINFER_SAMPLER=0
export PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore::FutureWarning HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false TQDM_DISABLE=1
logs=$(mktemp -d) && trap 'rm -r "$logs"' EXIT
if ((${#dry[@]})); then
    [[ $results != "$folder/results" ]] || results=$logs/results
    export CUDA_VISIBLE_DEVICES="" DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 TRITON_INTERPRET=1
    LIMIT=$DRY_LIMIT LONGER=()
fi

prove() { # PART
    local limit=${LONGER[$1]:-$LIMIT} rc=0
    printf '== part %s, at most %s s\n' "$1" "$limit"
    timeout --kill-after=5 "$limit" "$python" -m "tests.gpu.part_$1" --results "$results" "${dry[@]}" "${again[@]}" || rc=$?
    if ((rc == 124 || rc == 137)); then
        echo "part $1 ran out of its $limit s; what it found is kept: run it again to go on"
        rc=3
    fi
    return "$rc"
}

worst=0 running=()
if ((${#dry[@]})); then
    for part in "${parts[@]}"; do
        prove "$part" >"$logs/$part" 2>&1 &
        running+=($!)
    done
fi
for index in "${!parts[@]}"; do
    rc=0
    if ((${#dry[@]})); then
        wait "${running[$index]}" || rc=$?
        cat "$logs/${parts[$index]}"
    else
        prove "${parts[$index]}" || rc=$?
    fi
    ((rc <= worst)) || worst=$rc
done
write=()
((${#dry[@]})) || [[ $results != "$folder/results" ]] || write=(--write)
"$python" -m tests.gpu.table --results "$results" "${write[@]}"
exit "$worst"
