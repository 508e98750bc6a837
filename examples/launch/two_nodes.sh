#!/bin/bash
# torchrun: two machines of 8 GPUs, DeepSpeed ZeRO-3; start it on both, with the same HOST, the first machine's name.
#   command   HOST=node0 bash examples/launch/two_nodes.sh [RECIPE] [KEY=VALUE ...]
#   hardware  two nodes of 8 GPUs of 80 GB, the code and the data under the same paths on both
#   tested    that bash reads it and that the recipe loads; never run by us on GPUs, nor on two machines
# Twice the GPUs: half the rows a GPU keep the paper's 256 and 128 samples a step.
set -euo pipefail
RECIPE=${1:-llava15-7b-acformer145}
shift || true
torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-id acformer --rdzv-endpoint "${HOST:?name the first machine}:29500" \
  -m acformer.cli train "$RECIPE" \
  pretrain.training.deepspeed=examples/launch/zero3.json pretrain.training.per_device_train_batch_size=16 \
  finetune.training.deepspeed=examples/launch/zero3.json finetune.training.per_device_train_batch_size=8 "$@"
