#!/usr/bin/env bash
# Several hosts, started by hand: the same line on each of them, on FIRST first, on the others within ten minutes.
# Usage: NODES=2 FIRST=HOSTNAME launch/two_nodes.sh RECIPE OUT [setting=value ...]
#
# RECIPE, the model, the data and OUT must have the same names on every host, and OUT must be on a disk that all see.
set -euo pipefail

recipe=${1:?usage: $0 RECIPE OUT [setting=value ...]}
out=${2:?usage: $0 RECIPE OUT [setting=value ...]}
shift 2
first=${FIRST:?FIRST is the host where the processes meet, by a name or address that all hosts reach}
gpus=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600} # to save on SIGTERM; else 30 s
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) > gpus ? $(nproc) / gpus : 1))}
# Where a host has several networks, name the one that reaches the others, for weights (nccl) and numbers (gloo):
# export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0

# resume=auto: a run that has begun in OUT is continued, so the same line serves again after any end.
# Each host says its own address to the others; --local-addr is for hosts whose names the others cannot resolve.
exec torchrun --nnodes "${NODES:-2}" --nproc-per-node "$gpus" --max-restarts "${RESTARTS:-3}" \
  --rdzv-backend c10d --rdzv-endpoint "$first:29500" --rdzv-id "${RUN_ID:-graft}" \
  ${LOCAL_ADDR:+--local-addr "$LOCAL_ADDR"} \
  -m graft train "$recipe" "out=$out" resume=auto "$@"
