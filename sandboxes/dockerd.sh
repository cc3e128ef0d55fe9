#!/usr/bin/env bash
# Runs a command with a Docker engine of its own: `sandboxes/dockerd.sh COMMAND [ARGUMENTS]`, as root.
#
# The engine's data, state and socket are in a temporary folder and it touches neither bridges nor iptables, so it
# disturbs no other engine. DOCKER_HOST tells the command where it is. It ends with the command, or with this script.
set -euo pipefail

[ $# -gt 0 ] || { sed -n '2,5s/^# \{0,1\}//p' "$0"; exit 2; }
[ "$(id -u)" = 0 ] || { echo "$0: dockerd needs root" >&2; exit 1; }
if ! command -v dockerd >/dev/null; then
    echo "$0: no dockerd; install one, e.g. apt-get update && apt-get install -y docker.io" >&2
    exit 1
fi

folder=$(mktemp -d /var/tmp/agentrl-dockerd.XXXXXX)
echo "{}" >"$folder/config.json"  # else it reads that of the system
engine=
stop() {
    if [ -n "$engine" ]; then
        kill "$engine" 2>/dev/null || true
        wait "$engine" 2>/dev/null || true
    fi
    grep -o " $folder/[^ ]*" /proc/self/mounts | sort -r | xargs -r umount --lazy || true
    rm -rf "$folder"
}
trap stop EXIT
trap 'exit 143' TERM
trap 'exit 130' INT

# setpriv: an engine whose script is killed would live on with nobody to stop it
setpriv --pdeathsig TERM dockerd \
    --host "unix://$folder/docker.sock" --data-root "$folder/data" --exec-root "$folder/run" \
    --pidfile "$folder/pid" --config-file "$folder/config.json" --containerd-namespace agentrl --containerd-plugins-namespace agentrl-plugins \
    --bridge none --iptables=false --ip6tables=false --ip-forward=false --ip-masq=false \
    >"$folder/log" 2>&1 &
engine=$!
export DOCKER_HOST="unix://$folder/docker.sock"
for _ in $(seq 300); do
    [ -S "$folder/docker.sock" ] && break
    kill -0 "$engine" 2>/dev/null || break
    sleep 0.1
done
if ! [ -S "$folder/docker.sock" ]; then
    echo "$0: dockerd did not start:" >&2
    tail -n 20 "$folder/log" >&2
    exit 1
fi
"$@"
