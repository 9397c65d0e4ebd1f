#!/usr/bin/env bash
# Train with N processes on this machine: ./distributed_train.sh N DIR [flags of train.py]
#
# Over several machines, run it on each with the same flags and with
#   NNODES=2 NODE_RANK=0 (1, ...) MASTER_ADDR=first.machine MASTER_PORT=29500, or
#   NNODES=2 RDZV_ENDPOINT=first.machine:29500 (ranks are dealt out).
# With MAX_RESTARTS=3 a run whose processes fail is started again, up to three times, from its newest checkpoint.
set -eu
if ! [[ ${1:-} =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: $0 NUMBER_OF_PROCESSES DATA_DIRECTORY [flags of train.py]" >&2
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
exec "$python" -m timm_multilabel.cli.launch "${where[@]}" --nproc-per-node "$processes" "$root/train.py" "$@"
