#!/usr/bin/env bash
# A Ray cluster on machines that can be reached by ssh, with a token, for `cluster.address: auto` on the first of them.
#
#     ray-cluster.sh up   HEAD WORKER…     start Ray on HEAD, then on the others
#     ray-cluster.sh down HEAD WORKER…     stop it everywhere (every Ray of those machines)
#
# HEAD and WORKER are addresses by which the machines reach each other. Environment:
#     REMOTE           how to run a shell command on a machine (ssh)
#     RAY              the command on the machines (ray), e.g. /opt/dist-infer/.venv/bin/ray
#     RAY_PORT         Ray's port on HEAD (6379)
#     RAY_START_ARGS   more arguments of `ray start` on all of them, e.g. --labels=zone=a --resources='{"llm": 2}'
#     TOKEN_FILE       the token, on every machine ($HOME/.ray/auth_token, where Ray looks for it)
set -euo pipefail

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2; exit 2; }
[ $# -ge 2 ] || usage
action=$1 head=$2
shift 2
remote=${REMOTE:-ssh} ray=${RAY:-ray} port=${RAY_PORT:-6379} token_file=${TOKEN_FILE:-'$HOME/.ray/auth_token'}

# The token goes through standard input: arguments can be seen by everybody on a machine.
give_token() {
    printf '%s\n' "$token" | $remote "$1" "umask 077; mkdir -p \"\$(dirname \"$token_file\")\" && cat > \"$token_file\""
}

# niceness: by default ranks would wait for whatever else runs
settings="RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=\"$token_file\" RAY_USAGE_STATS_ENABLED=0 RAY_worker_niceness=0"
# messages are small: the object store is never used for weights
common="--object-store-memory=80000000 ${RAY_START_ARGS:-}"

case $action in
up)
    token=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
    for machine in "$head" "$@"; do give_token "$machine"; done
    $remote "$head" "$settings $ray start --head --node-ip-address=$head --port=$port --include-dashboard=false $common"
    for machine in "$@"; do
        $remote "$machine" "$settings $ray start --address=$head:$port --node-ip-address=$machine $common"
    done
    echo "on $head: RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=\"$token_file\" dist-infer launch FILE  (cluster.address: auto)"
    ;;
down)
    for machine in "$@" "$head"; do
        $remote "$machine" "$ray stop" || echo "$machine: ray stop failed" >&2
    done
    ;;
*) usage ;;
esac
