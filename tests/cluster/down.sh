#!/usr/bin/env bash
# Ends what up.sh started and removes its folder; Debian's packages stay.
set -euo pipefail
W=${ENTRORAY_CLUSTER:-/var/tmp/entroray-cluster}
[[ -f $W/env.sh ]] || { echo "down.sh: up.sh made nothing in $W" >&2 && exit 3; }
for pid in "$W"/slurm/slurmd.s?.pid "$W"/slurm/slurmctld.pid "$W"/slurm/munged.pid "$W"/run/docker.pid; do
    [[ ! -f $pid ]] || kill "$(cat "$pid")" 2>/dev/null || true
done
for _ in $(seq 30); do [[ -f $W/run/docker.pid ]] || break; sleep 1; done
for n in 1 2 3; do ip netns del s$n 2>/dev/null || true; done
ip link del slurmbr 2>/dev/null || true
ip link del docker0 2>/dev/null || true
rm -rf "$W"
