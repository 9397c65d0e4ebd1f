#!/usr/bin/env bash
# Train with N processes on this machine: ./distributed_train.sh N DIR [flags of timm-multilabel train]
#
# The same as ./distributed_run.sh N train DIR ..., which says how several machines train together.
set -eu
if ! [[ ${1:-} =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: $0 NUMBER_OF_PROCESSES DATA_DIRECTORY [flags of timm-multilabel train]" >&2
    exit 2
fi
processes=$1
shift
exec "$(dirname "${BASH_SOURCE[0]}")/distributed_run.sh" "$processes" train "$@"
