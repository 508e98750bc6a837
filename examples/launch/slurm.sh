#!/bin/bash
# SLURM: one machine of 8 GPUs, FSDP2; a job that is stopped goes on where it was when it starts again.
#   command   sbatch examples/launch/slurm.sh [RECIPE] [KEY=VALUE ...]
#   hardware  one node of 8 GPUs of 80 GB
#   tested    that bash reads it and that the recipe loads; never run by us on GPUs, nor under SLURM
# SIGTERM comes two minutes before the time limit; acformer then returns 75 and the job asks to be queued again.
#SBATCH --job-name=acformer
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -uo pipefail
RECIPE=${1:-llava15-7b-acformer145}
shift || true
srun accelerate launch --config_file examples/launch/fsdp2.yaml -m acformer.cli train "$RECIPE" "$@"
code=$?
if [ "$code" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
