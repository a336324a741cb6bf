#!/usr/bin/env bash
# One machine, one rank for each GPU:  launch/local.sh RUN.toml [section.key=value ...]
set -euo pipefail

GPUS=${GPUS:-}                      # ranks; empty: all GPUs of the machine
PORT=${PORT:-29500}                 # of rank 0; two runs on one machine need two
BIND=${BIND:-1}                     # 1: each rank keeps to cores of its own (needs numactl)

[ $# -ge 1 ] || { sed -n 's/^# \(.*:  \)/\1/p' "$0"; exit 2; }
# shellcheck source=launch/env.sh
. "$(dirname "$0")/env.sh"

run_folder "$@" > /dev/null || exit 2
[ "$BIND" = 1 ] && command -v numactl > /dev/null || BIND=
exec deepspeed ${GPUS:+--num_gpus "$GPUS"} ${BIND:+--bind_cores_to_rank} --master_port "$PORT" \
  --module megagpt.train "$@"
