#!/usr/bin/env bash
# One host, one process per GPU. Usage: launch/one_node.sh RECIPE OUT [setting=value ...]
#
# `graft train RECIPE --gpus 8 out=OUT` does the same without torchrun; this file adds restarts.
set -euo pipefail

recipe=${1:?usage: $0 RECIPE OUT [setting=value ...]}
out=${2:?usage: $0 RECIPE OUT [setting=value ...]}
shift 2
gpus=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}

# On SIGTERM the processes save a checkpoint; torchrun would kill them after 30 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
# Threads of each process on the CPU; torchrun sets 1.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) > gpus ? $(nproc) / gpus : 1))}

# resume=auto: a run that has begun in OUT is continued, so the same line serves again after any end.
# --max-restarts: processes that fail are started anew, and go on from the newest checkpoint in OUT.
exec torchrun --standalone --nproc-per-node "$gpus" --max-restarts "${RESTARTS:-3}" \
  -m graft train "$recipe" "out=$out" resume=auto "$@"
