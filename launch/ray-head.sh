#!/usr/bin/env bash
# Starts the head of a Ray cluster here: launch/ray-head.sh [--host=ADDRESS] [--port=6379] [--dashboard-port=8265] [ray's own]
# On loopback unless --host says otherwise (`auto`: this machine's first address), and never without a token.
set -euo pipefail

host=127.0.0.1 port=6379 dashboard=8265 rest=()
for argument in "$@"; do
    case $argument in
    --host=auto) read -r host _ < <(hostname -I) ;;
    --host=*) host=${argument#*=} ;;
    --port=*) port=${argument#*=} ;;
    --dashboard-port=*) dashboard=${argument#*=} ;;
    --help) sed -n 2,3p "$0" && exit 0 ;;
    *) rest+=("$argument") ;;
    esac
done
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

[[ ${RAY_AUTH_MODE:-token} == token ]] || refuse "RAY_AUTH_MODE=$RAY_AUTH_MODE: anybody who reaches $host could run code here; unset it"
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
[[ $host != 127.0.0.1 ]] || export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 # else Ray takes another address of this machine
[[ -n ${RAY_AUTH_TOKEN:-} ]] || ray get-auth-token --generate >/dev/null 2>&1 # kept in ~/.ray/auth_token

say "head on $host; on every other node, with the same checkout and the token of ~/.ray/auth_token or RAY_AUTH_TOKEN:"
say "  launch/ray-worker.sh $host:$port"
say "jobs: entroray submit --address=http://$host:$dashboard experiment=quickstart; an end to it: .venv/bin/ray stop"
exec ray start --head --node-ip-address="$host" --port="$port" --include-dashboard=true --dashboard-host="$host" \
    --dashboard-port="$dashboard" --disable-usage-stats ${rest[@]+"${rest[@]}"}
