#!/bin/bash
# sbatch examples/launch/slurm.sh, from the root of the repository. A job that is killed or runs out of time can be
# submitted again: it goes on with the parts that are missing.
#SBATCH --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=64 --time=12:00:00
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export NNODES=$SLURM_NNODES RDZV_ENDPOINT=$first:${PORT:-29500} RDZV_ID=$SLURM_JOB_ID
srun --kill-on-bad-exit=1 ./distributed_run.sh "${SLURM_GPUS_ON_NODE:-8}" embed "${CHECKPOINT:-model_best.pth.tar}" "${PHOTOS:-photos/}" \
    --out "${OUT:-embeddings/}" -j 7
