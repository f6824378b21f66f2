#!/usr/bin/env bash
# Starts the head of a Ray cluster here: launch/ray-head.sh [--host=ADDRESS] [--port=6379] [--dashboard-port=8265] [ray's own]
# On loopback unless --host says otherwise (`auto`: this machine's first address), and never without a token.
# With --block it stays; SIGTERM then stops the jobs first, each of which saves a checkpoint.
set -euo pipefail

host=127.0.0.1 port=6379 dashboard=8265 rest=()
for argument in "$@"; do
    case $argument in
    --host=auto) read -r host _ < <(hostname -I) ;;
    --host=*) host=${argument#*=} ;;
    --port=*) port=${argument#*=} ;;
    --dashboard-port=*) dashboard=${argument#*=} ;;
    --help) sed -n 2,4p "$0" && exit 0 ;;
    *) rest+=("$argument") ;;
    esac
done
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

[[ ${RAY_AUTH_MODE:-token} == token ]] || refuse "RAY_AUTH_MODE=$RAY_AUTH_MODE: anybody who reaches $host could run code here; unset it"
# shellcheck source=launch/ray-node.sh
source launch/ray-node.sh
[[ $host != 127.0.0.1 ]] || export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 # else Ray takes another address of this machine
[[ -n ${RAY_AUTH_TOKEN:-} ]] || ray get-auth-token --generate >/dev/null 2>&1 # kept in ~/.ray/auth_token

say "head on $host; on every other node, with the same checkout and the token of ~/.ray/auth_token or RAY_AUTH_TOKEN:"
say "  launch/ray-worker.sh $host:$port"
say "jobs: entroray submit --address=http://$host:$dashboard experiment=quickstart; an end to it: .venv/bin/ray stop"

before_end() { # within 50 s, for whoever asks gives 60
    python - "http://$host:$dashboard" 2>/dev/null <<'END' || true # none where Ray is not up
import sys, time
from ray.job_submission import JobSubmissionClient

client, ends = JobSubmissionClient(sys.argv[1]), time.monotonic() + 50
running = [j.submission_id for j in client.list_jobs() if j.submission_id and not j.status.is_terminal()]
for job in running:
    print(f"stopping {job}", flush=True)
    client.stop_job(job)
while time.monotonic() < ends and not all(client.get_job_status(job).is_terminal() for job in running):
    time.sleep(0.5)
END
}

serve ray start --head --node-ip-address="$host" --port="$port" --include-dashboard=true --dashboard-host="$host" \
    --dashboard-port="$dashboard" --disable-usage-stats ${rest[@]+"${rest[@]}"}
