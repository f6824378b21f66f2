#!/usr/bin/env bash
# Makes tests/gpu/pieces: what part d needs of Python packages that a bare machine with torch has not.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

usage() {
    cat <<'END'
usage: tests/gpu/pieces.sh [PYTHON_VERSION]

Downloads wheels by pip's own settings and unpacks them into tests/gpu/pieces, for x86-64 Linux and the Python
of the machine with the card, 3.12 if not given. Run it in this checkout's .venv, whose torch builds DeepSpeed's
wheel. Copy the checkout with that folder to the machine; prove.sh puts it on its path.
END
}
[[ ${1:-} != -h && ${1:-} != --help ]] || { usage && exit; }

folder=tests/gpu/pieces version=${1:-3.12} python=${PYTHON:-python3} most=60 # MiB
pin() { "$python" -c 'import sys, re; print(re.search(rf"\"({sys.argv[1]}==[^\"]+)\"", open("pyproject.toml").read())[1])' "$1"; }

# DeepSpeed's own needs that are not on the machine; pydantic-core is the one compiled package.
needs=(hjson==3.1.0 pydantic==2.14.4 pydantic-core==2.50.5 annotated-types==0.8.0 typing-inspection==0.4.5)
if liger=$(pin liger-kernel 2>/dev/null); then needs+=("$liger"); fi
wheels=$(mktemp -d)
trap 'rm -r "$wheels"' EXIT

"$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$wheels" "$(pin deepspeed)"
"$python" -m pip download --quiet --no-deps --only-binary=:all: --dest "$wheels" \
    --implementation cp --python-version "$version" --abi "cp${version/./}" --abi abi3 --abi none \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform any \
    "${needs[@]}"

size=$(du -sm "$wheels" | cut -f1)
((size <= most)) || { echo "pieces.sh: the wheels take $size MiB, at most $most can be copied" >&2 && exit 1; }
rm -rf "$folder" && mkdir "$folder"
for wheel in "$wheels"/*.whl; do
    "$python" -m zipfile -e "$wheel" "$folder"
    printf '%8d KiB  %s\n' $(($(stat -c %s "$wheel") / 1024)) "${wheel##*/}"
done
echo "$folder: $(du -sm "$folder" | cut -f1) MiB, of wheels of $size MiB"
