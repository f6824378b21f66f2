#!/usr/bin/env bash
# Sourced by ray-head.sh and ray-worker.sh, after setup.sh: what both kinds of node do.
set -euo pipefail

export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
# Asked to end, Ray would wait 30 s for actors to leave this node; ours are ended or replaced by their driver.
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=${RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S:-0}

before_end() { :; }

serve() { # COMMAND...: until it ends, with its code; SIGTERM and Ctrl-C end it, with 0
    local code=0 told="" node
    trap 'told=${told:-1}' TERM INT
    "$@" &
    node=$!
    while true; do
        if [[ $told == 1 ]]; then
            told=2
            before_end
            kill -TERM "$node" 2>/dev/null || true
        fi
        code=0 && wait "$node" || code=$?
        [[ $told == 1 ]] || kill -0 "$node" 2>/dev/null || break
    done
    [[ -z $told ]] || code=0
    exit "$code"
}
