#!/usr/bin/env bash
# A Docker engine, base images and a Slurm of three nodes on a Debian 12 machine without an image registry (root, 7 minutes, 6.5 GB):
#   tests/cluster/up.sh && source /var/tmp/entroray-cluster/env.sh && launch/test.sh cluster; tests/cluster/down.sh
# All of it lies in ENTRORAY_CLUSTER, but for packages of Debian and one bridge. `up.sh docker` or `up.sh slurm`: only that one.
set -euo pipefail
W=${ENTRORAY_CLUSTER:-/var/tmp/entroray-cluster}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "$W" && cd "$W"
((EUID == 0)) || { echo "up.sh: needs root, for namespaces and an engine" >&2 && exit 3; }
((${#} > 0)) || set -- docker slurm
mirror=$(apt-get indextargets --format '$(REPO_URI)' | grep -m1 'debian/' | sed 's:/$::')

engine() { # Engine 26, Compose 2.26 and Buildx of the next Debian, whose programs in Go run on this one; its runc and tini
    mkdir -p debs root run exec docker cfg/cli-plugins apt/{lists/partial,cache/archives/partial,parts}
    apt-get update -q && apt-get install -qy --no-install-recommends debootstrap iptables runc tini
    cat >apt/next.sources <<X
Types: deb
URIs: $mirror
Suites: trixie
Components: main
Architectures: amd64
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
X
    cat >apt/apt.conf <<X
Dir::Etc::sourcelist "$W/apt/next.sources";
Dir::Etc::sourceparts "$W/apt/parts";
Dir::State::lists "$W/apt/lists";
Dir::Cache "$W/apt/cache";
APT::Sandbox::User "root";
X
    apt-get -q -c apt/apt.conf update
    (cd debs && apt-get -q -c ../apt/apt.conf download docker.io containerd docker-cli docker-compose docker-buildx)
    for package in debs/*.deb; do dpkg -x "$package" root; done
    cp root/usr/libexec/docker/cli-plugins/* cfg/cli-plugins/
    cat >daemon.json <<X
{"data-root": "$W/docker", "exec-root": "$W/exec", "pidfile": "$W/run/docker.pid", "hosts": ["unix://$W/run/docker.sock"],
 "init-path": "/usr/bin/tini-static", "storage-driver": "overlay2", "mtu": 1400}
X
    sysctl -qw net.ipv4.ip_forward=1 # before the engine, so that it leaves the policy of FORWARD alone
    setsid nohup dockerd --config-file=daemon.json >dockerd.log 2>&1 </dev/null &
    for _ in $(seq 60); do ! docker version >/dev/null 2>&1 || return 0; sleep 1; done
    tail dockerd.log >&2 && exit 4
}

bases() { # python:3.11-slim-bookworm as the Dockerfile asks for it: Debian by debootstrap, this machine's CPython and pip's settings
    local wheels python
    wheels=$(python3 -m pip config get global.find-links || true)
    python=$(python3.11 -c 'import sys; print(sys.base_prefix)')
    if ! docker image inspect local/debian:bookworm >/dev/null 2>&1; then
        rm -rf rootfs && debootstrap --variant=minbase --include=ca-certificates bookworm rootfs "$mirror" >debootstrap.log
        rm -rf rootfs/var/cache/apt/archives/*.deb rootfs/var/lib/apt/lists/*
        printf "deb $mirror %s main\n" bookworm bookworm-updates >rootfs/etc/apt/sources.list
        printf 'Acquire::Check-Valid-Until "false";\nAcquire::Check-Date "false";\n' >rootfs/etc/apt/apt.conf.d/90here
        cp /usr/local/share/ca-certificates/*.crt rootfs/usr/local/share/ca-certificates/ 2>/dev/null || true
        chroot rootfs update-ca-certificates >/dev/null 2>&1
        printf '[global]\ncert = /etc/ssl/certs/ca-certificates.crt\ntimeout = 180\n' >rootfs/etc/pip.conf
        if [[ -d $wheels ]]; then
            printf 'find-links = %s\n' "$wheels" >>rootfs/etc/pip.conf
            mkdir -p "rootfs$wheels" && cp "$wheels"/torch-*+cpu-cp311-*.whl "rootfs$wheels/"
        fi
        tar -C rootfs -c . | docker import - local/debian:bookworm
        rm -rf rootfs
    fi
    ! docker image inspect python:3.11-slim-bookworm >/dev/null 2>&1 || return 0
    mkdir -p base && tar -C "$python" --exclude='lib/python3.11/site-packages/*' --exclude=lib/python3.11/test \
        --exclude=__pycache__ -cf base/python.tar bin/python3.11 bin/python3.11-config include/python3.11 lib
    cat >base/Dockerfile <<'X'
FROM local/debian:bookworm
RUN apt-get update && apt-get install -y --no-install-recommends libssl3 libffi8 libsqlite3-0 libbz2-1.0 liblzma5 libreadline8 \
    zlib1g libncursesw6 libexpat1 libuuid1 netbase tzdata && rm -rf /var/lib/apt/lists/*
ADD python.tar /usr/local/
RUN ldconfig && rm -f /usr/local/bin/pip* && /usr/local/bin/python3.11 -m ensurepip --upgrade \
    && ln -sf python3.11 /usr/local/bin/python3 && ln -sf python3.11 /usr/local/bin/python && python3 -c 'import ssl, sqlite3, lzma'
CMD ["python3"]
X
    docker build -q -t python:3.11-slim-bookworm base && rm -rf base
}

slurm() { # s1, s2 and s3 in namespaces on a bridge, the controller on s1, its own munge; s1's commands in $W/bin
    apt-get install -qy --no-install-recommends munge slurm-client slurmctld slurmd iproute2
    mkdir -p slurm/state slurm/spool.s{1,2,3} bin && chmod 755 . slurm && cd slurm
    printf '127.0.0.1 localhost\n10.98.0.1 s1\n10.98.0.2 s2\n10.98.0.3 s3\n' >hosts
    cat >slurm.conf <<X
ClusterName=entroray
SlurmctldHost=s1(10.98.0.1)
SlurmUser=root
AuthInfo=socket=$W/slurm/munge.socket
SlurmctldPidFile=$W/slurm/slurmctld.pid
SlurmdPidFile=$W/slurm/slurmd.%n.pid
SlurmctldLogFile=$W/slurm/slurmctld.log
SlurmdLogFile=$W/slurm/slurmd.%n.log
StateSaveLocation=$W/slurm/state
SlurmdSpoolDir=$W/slurm/spool.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
MpiDefault=none
ReturnToService=2
NodeName=s[1-3] NodeAddr=10.98.0.[1-3] CPUs=$(nproc) State=UNKNOWN
PartitionName=all Nodes=s[1-3] Default=YES MaxTime=INFINITE State=UP
X
    cat >in.sh <<X
#!/usr/bin/env bash
# in.sh N COMMAND...: on node sN
n=\$1; shift
export SLURM_CONF=$W/slurm/slurm.conf PATH=/usr/sbin:/usr/bin:\$PATH # before the commands of bin, which call this
exec nsenter --net=/run/netns/s\$n unshare --uts --mount bash -c 'hostname s'\$n'; mount --bind $W/slurm/hosts /etc/hosts; exec "\$@"' _ "\$@"
X
    for name in sbatch squeue scontrol scancel sinfo; do
        printf '#!/usr/bin/env bash\nexec %s/slurm/in.sh 1 /usr/bin/%s "$@"\n' "$W" "$name" >"../bin/$name"
    done
    chmod +x in.sh ../bin/*
    [[ -f munge.key ]] || (umask 077 && head -c 128 /dev/urandom >munge.key)
    [[ -S munge.socket ]] || munged --num-threads=4 --key-file="$PWD/munge.key" --socket="$PWD/munge.socket" \
        --pid-file="$PWD/munged.pid" --log-file="$PWD/munged.log" --seed-file="$PWD/munged.seed"
    ip link add slurmbr type bridge && ip link set slurmbr up
    for n in 1 2 3; do
        ip netns add s$n && ip link add slv$n type veth peer name eth0 netns s$n && ip link set slv$n master slurmbr up
        ip -n s$n addr add 10.98.0.$n/24 dev eth0 && ip -n s$n link set eth0 up && ip -n s$n link set lo up
    done
    ./in.sh 1 slurmctld -f "$PWD/slurm.conf" -c
    for n in 1 2 3; do ./in.sh $n slurmd -N s$n -f "$PWD/slurm.conf"; done
    cd ..
    for _ in $(seq 30); do [[ $(bin/sinfo -h -t idle -o %D) != 3 ]] || return 0; sleep 1; done
    bin/sinfo >&2 && exit 4
}

cat >env.sh <<X
export ENTRORAY_CLUSTER=$W PATH=$W/bin:$W/root/usr/bin:$W/root/usr/sbin:/usr/sbin:\$PATH SLURM_CONF=$W/slurm/slurm.conf
export DOCKER_HOST=unix://$W/run/docker.sock DOCKER_CONFIG=$W/cfg
X
source ./env.sh
for part in "$@"; do
    case $part in
    docker) engine && bases ;;
    slurm) slurm ;;
    *) echo "up.sh: docker or slurm, not $part" >&2 && exit 2 ;;
    esac
done
echo "now: source $W/env.sh && launch/test.sh cluster; an end to it: $here/down.sh"
