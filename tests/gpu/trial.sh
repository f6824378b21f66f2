#!/usr/bin/env bash
# Tries the pieces on a CPU: a bare Python 3.12 with torch 2.11, and a card that only pretends to be there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

usage() {
    cat <<'END'
usage: tests/gpu/trial.sh

Unpacks tests/gpu/pieces, builds stubs of libcuda.so.1 and libnvidia-ml.so.1 that answer as one H100 would until
something is to be computed, and has Python, what PYTHON names, import `vllm.LLM`, load vLLM's compiled parts, and
begin to build an engine; it ends where a card is needed. That Python is to have what README.md says a bare machine
has: torch 2.11, transformers 5.17, accelerate and their needs, and none of what is in the pieces. Needs gcc.
END
}
(($# == 0)) || { usage && exit $(($1 == -h ? 0 : 2)); }

folder=tests/gpu python=${PYTHON:-python3}
"$python" -m tests.gpu.pieces --unpack
stubs=$(mktemp -d) && trap 'rm -r "$stubs"' EXIT
gcc -shared -fPIC -O1 -o "$stubs/libnvidia-ml.so.1" "$folder/stub_nvml.c"
# Every function of the driver that vLLM's libraries name: 100 is CUDA_ERROR_NO_DEVICE.
find "$folder/unpacked/vllm" -name '*.so' -exec nm -D --undefined-only {} + | grep -oE '\bcu[A-Z][A-Za-z0-9_]+' | grep -vE '^cu(blas|rand|sparse|solver|dnn)' |
    sort -u | sed 's/.*/int &(void) { return 100; }/' >"$stubs/cuda.c"
echo 'int cuInit(unsigned int flags) { return 100; }' | cat - <(grep -v cuInit "$stubs/cuda.c") >"$stubs/all.c"
gcc -shared -fPIC -O1 -Wl,-soname,libcuda.so.1 -o "$stubs/libcuda.so.1" "$stubs/all.c"
# An empty CUDA_VISIBLE_DEVICES has vLLM keep Triton although no driver of it is active.
CUDA_VISIBLE_DEVICES="" LD_LIBRARY_PATH=$stubs PYTHONPATH=$PWD:$PWD/$folder/unpacked "$python" -m tests.gpu.trial
