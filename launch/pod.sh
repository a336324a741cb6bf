#!/usr/bin/env bash
# Inside a pod of a PyTorchJob or TrainJob, from the manifest of `megagpt launch kubernetes`:  launch/pod.sh RUN.toml [section.key=value ...]
# It ends with 138 where another start may get on, which the operator then makes.
set -uo pipefail

NODES=${NODES:-1}                   # pods
GPUS=${GPUS:-1}                     # ranks of each
node=${PET_NODE_RANK:-${RANK:-0}}   # as the Trainer or the Training Operator says it
address=${PET_MASTER_ADDR:-${MASTER_ADDR:-127.0.0.1}} port=${PET_MASTER_PORT:-${MASTER_PORT:-29500}}

[ $# -ge 1 ] || { sed -n 's/^# \(.*:  \)/\1/p' "$0"; exit 2; }
# shellcheck source=launch/env.sh
. "$(dirname "$0")/env.sh"
folder=$(run_folder "$@") || exit 2
before=$(newest_checkpoint "$folder")
hosts=$(mktemp -q)
for ((i = 0; i < NODES; i++)); do echo "pod-$i slots=$GPUS"; done > "$hosts"
# To the ranks alone: deepspeed's launcher gives a save 30 seconds.
trap 'told=1; pkill -TERM -f -- "-m megagpt.train"' TERM INT
deepspeed --hostfile "$hosts" --no_ssh --node_rank "$node" --master_addr "$address" \
  --master_port "$port" --force_multi --module megagpt.train "$@" &
wait_on $!
[ "$code" != 0 ] || complete "$@" || code=138
case $code in 0 | 2 | 3) exit "$code" ;; esac
# The first pod counts starts that save nothing, for all; what it ends with ends the job.
if [ "$node" = 0 ] && ! gets_on "$code" "$folder" "$before" "${HOSTNAME:-pod}"; then
  exit "$((code % 128 ? code % 128 : 1))"
fi
exit 138
