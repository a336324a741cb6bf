#!/usr/bin/env bash
# torchrun, started once on every host:  NODES=2 MASTER=host0 launch/torchrun.sh RUN.toml [section.key=value ...]
# In a job of SLURM:  srun --ntasks-per-node=1 launch/torchrun.sh RUN.toml
set -euo pipefail

NODES=${NODES:-${SLURM_STEP_NUM_NODES:-1}}
GPUS=${GPUS:-${SLURM_GPUS_ON_NODE:-auto}}   # ranks on this host; auto: one for each GPU
MASTER=${MASTER:-}                          # the host where all meet; empty: the job's first one
PORT=${PORT:-}
INTERFACE=${INTERFACE:-}                    # network between the hosts; empty: each rank's way to rank 0

[ $# -ge 1 ] || { sed -n 's/^# \(.*:  \)/\1/p' "$0"; exit 2; }
# shellcheck source=launch/slurm.sh
. "$(dirname "$0")/slurm.sh"

hosts=("${MASTER:-localhost}")
if [ -n "${SLURM_JOB_NODELIST:-}" ]; then
  mapfile -t hosts < <(slurm_hosts)
  PORT=${PORT:-$(slurm_port)}
fi
exec torchrun --nnodes "$NODES" --nproc-per-node "$GPUS" --rdzv-backend c10d \
  --rdzv-endpoint "${MASTER:-${hosts[0]}}:${PORT:-29500}" --rdzv-id "${SLURM_JOB_ID:-megagpt}" \
  -m megagpt.train "$@"
