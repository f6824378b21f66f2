#!/usr/bin/env bash
# Makes tests/gpu/pieces: what parts d to h need of Python packages that a bare machine with torch has not.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

usage() {
    cat <<'END'
usage: tests/gpu/pieces.sh [--without-model] [PYTHON_VERSION]

Downloads the wheels that pieces.tsv names, by pip's own settings, and writes of them zips of at most 61 MiB
and their SHA256SUMS into tests/gpu/pieces, for x86-64 Linux and the Python of the machine with the card, 3.12
if not given. Run it in this checkout's .venv, whose torch builds DeepSpeed's wheel and which trains the model
that part h begins with, in two minutes, unless --without-model is given. Wheels are kept in
tests/gpu/pieces/wheels for the next time. Copy the checkout and the zips, one at a time if need be;
prove.sh checks and unpacks those that it finds.
END
}

version=3.12 model=1
while (($#)); do
    case $1 in
    -h | --help) usage && exit ;;
    --without-model) model=0 ;;
    [0-9]*) version=$1 ;;
    *) usage >&2 && exit 2 ;;
    esac
    shift
done

folder=tests/gpu/pieces python=${PYTHON:-python3}
wheels=$folder/wheels
mkdir -p "$wheels"
mapfile -t built < <("$python" -m tests.gpu.pieces --requirements built)
mapfile -t needs < <("$python" -m tests.gpu.pieces --requirements wheel)

"$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$wheels" "${built[@]}"
"$python" -m pip download --quiet --no-deps --only-binary=:all: --dest "$wheels" \
    --implementation cp --python-version "$version" --abi "cp${version/./}" --abi abi3 --abi none \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    --platform manylinux_2_24_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_31_x86_64 \
    --platform manylinux_2_12_x86_64 --platform manylinux2010_x86_64 --platform manylinux1_x86_64 --platform any \
    "${needs[@]}"

if ((model)); then # in bf16, as cluster=one_gpu reads it
    ENTRORAY_CACHE=$PWD/$folder/cache "$python" -m entroray warm-start experiment=quickstart model=bf16
fi
"$python" -m tests.gpu.pieces "$wheels"
