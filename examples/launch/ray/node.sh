#!/usr/bin/env bash
# A node of a Ray cluster for torchspec, in the foreground: Ctrl-C or SIGTERM ends it.
#   node.sh head [ADDRESS]      the first one; ADDRESS: under which the others reach it, where it has several
#   node.sh join HOST:PORT      another one
# Words after these go to `ray start` (--num-gpus=4, --resources='{"NPU": 8}', ...). PORT is 6379, or RAY_PORT.
set -euo pipefail

usage() {
    sed -n '2,5s/^# \?//p' "$0" >&2
    exit 2
}

# Ray listens on every interface, whatever it is told, and runs what it is asked to. So it asks for a token, which is
# in a file that this user alone can read.
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token} RAY_AUTH_TOKEN_PATH=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}

# Ray would run its workers at the lowest priority, and what runs below them is the training itself.
export RAY_worker_niceness=0

case ${1:-} in
head)
    shift
    words=(--port="${RAY_PORT:-6379}" --include-dashboard=false)
    if [[ -n ${1:-} && $1 != --* ]]; then
        words+=(--node-ip-address="$1")
        shift
    fi
    if [[ $RAY_AUTH_MODE == token && ! -s $RAY_AUTH_TOKEN_PATH ]]; then
        mkdir -p "$(dirname "$RAY_AUTH_TOKEN_PATH")"
        (umask 077 && python3 -c 'import secrets; print(secrets.token_hex(32), end="")' >"$RAY_AUTH_TOKEN_PATH")
    fi
    echo "port ${RAY_PORT:-6379}; the other nodes, and who trains, need the token in $RAY_AUTH_TOKEN_PATH"
    exec ray start --head --block --disable-usage-stats "${words[@]}" "$@"
    ;;
join)
    [[ ${2:-} == *:* ]] || usage
    if [[ $RAY_AUTH_MODE == token && ! -s $RAY_AUTH_TOKEN_PATH ]]; then
        echo "there is no token in $RAY_AUTH_TOKEN_PATH: copy it from the first node" >&2
        exit 1
    fi
    exec ray start --block --address="$2" --disable-usage-stats "${@:3}"
    ;;
*)
    usage
    ;;
esac
