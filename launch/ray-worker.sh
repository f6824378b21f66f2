#!/usr/bin/env bash
# Joins this machine to a Ray cluster: launch/ray-worker.sh HEAD:6379 [--host=ADDRESS] [ray's own]
# The head's token must be here: in RAY_AUTH_TOKEN, or in ~/.ray/auth_token. A head still to come is waited for, 5 minutes.
set -euo pipefail

head="" own=() rest=()
for argument in "$@"; do
    case $argument in
    --host=*) own=(--node-ip-address="${argument#*=}") ;;
    --help) sed -n 2,3p "$0" && exit 0 ;;
    -*) rest+=("$argument") ;;
    *) head=$argument ;;
    esac
done
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

[[ $head == *:* ]] || refuse "say which head to join, as in: launch/ray-worker.sh 10.0.0.1:6379"
[[ -n ${RAY_AUTH_TOKEN:-} || -s ${HOME:-}/.ray/auth_token ]] ||
    refuse "no token here: copy ~/.ray/auth_token from the head (\`ray get-auth-token\` prints it), or set RAY_AUTH_TOKEN"
# shellcheck source=launch/ray-node.sh
source launch/ray-node.sh

SECONDS=0
until (: <>"/dev/tcp/${head%:*}/${head##*:}") 2>/dev/null; do
    ((SECONDS < ${ENTRORAY_HEAD_WITHIN:-300})) || refuse "nothing answers at $head: start launch/ray-head.sh there with --host=${head%:*}"
    sleep 1
done
serve ray start --address="$head" ${own[@]+"${own[@]}"} --disable-usage-stats ${rest[@]+"${rest[@]}"}
