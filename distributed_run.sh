#!/usr/bin/env bash
# Run a command in N processes on this machine, one for each GPU: ./distributed_run.sh N COMMAND [arguments]
# COMMAND is train, validate, probe, predict, embed or check.
#
# Over several machines, run it on each with the same arguments and with
#   NNODES=2 NODE_RANK=0 (1, ...) MASTER_ADDR=first.machine MASTER_PORT=29500, or
#   NNODES=2 RDZV_ENDPOINT=first.machine:29500 (ranks are dealt out).
# With MAX_RESTARTS=3 a run whose processes fail is started again, up to three times: training from its newest
# checkpoint, predict and embed with the parts that are missing.
set -eu
if ! [[ ${1:-} =~ ^[1-9][0-9]*$ && ${2:-} =~ ^[a-z]+$ ]]; then
    echo "usage: $0 NUMBER_OF_PROCESSES COMMAND [arguments of timm-multilabel COMMAND]" >&2
    exit 2
fi
processes=$1
shift
python=$(command -v python || command -v python3)
where=(--nnodes "${NNODES:-1}" --max-restarts "${MAX_RESTARTS:-0}")
if [[ -n ${RDZV_ENDPOINT:-} ]]; then
    where+=(--rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "${RDZV_ID:-timm-multilabel}")
elif [[ -n ${MASTER_ADDR:-} || ${NNODES:-1} != 1 ]]; then
    where+=(--node-rank "${NODE_RANK:-0}" --master-addr "${MASTER_ADDR:-localhost}" --master-port "${MASTER_PORT:-29500}")
else
    where+=(--standalone)
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m timm_multilabel.cli.launch "${where[@]}" --nproc-per-node "$processes" -m timm_multilabel "$@"
