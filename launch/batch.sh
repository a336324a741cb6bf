#!/usr/bin/env bash
# Inside a job of PBS or LSF, from the script of `megagpt launch pbs` or `lsf`:  launch/batch.sh RUN.toml [section.key=value ...]
# After the end of its time, or a crash, the job is queued again until the run is done.
trap 'asked=1' TERM USR1 USR2 XCPU  # as early as can be
set -uo pipefail

RANKS=${RANKS:-1}                   # of the whole job
PER_HOST=${PER_HOST:-$RANKS}
CORES=${CORES:-1}                   # of each rank
JOB=${JOB:-}                        # the job's own script, which PBS is given again
INTERFACE=${INTERFACE:-}            # network between the hosts; empty: each rank's way to rank 0

[ $# -ge 1 ] || { sed -n 's/^# \(.*:  \)/\1/p' "$0"; exit 2; }
cd "${PBS_O_WORKDIR:-${LS_SUBCWD:-$PWD}}" || exit 2
# shellcheck source=launch/env.sh
. "${MEGAGPT_LAUNCH:-launch}/env.sh"
folder=$(run_folder "$@") || exit 2
before=$(newest_checkpoint "$folder")
# PBS gives the next start another number, which is still the same job.
id=${MEGAGPT_JOB:-${PBS_JOBID:-${LSB_JOBID:-$$}}}
if [ -z "${LAUNCH:-}" ] && mpiexec --version 2> /dev/null | grep -qiE 'open ?(mpi|rte)|prrte'; then
  LAUNCH="mpiexec -n $RANKS --map-by ppr:$PER_HOST:node:pe=$CORES"
fi
LAUNCH=${LAUNCH:-mpiexec -n $RANKS -ppn $PER_HOST}

step='' code=143
# Launchers of MPI pass USR1 on, and end their ranks unsaved on TERM.
trap 'asked=1 told=1; [ -z "$step" ] || kill -USR1 "$step"' TERM USR1 USR2 XCPU
if [ -z "${asked:-}" ]; then
  # shellcheck disable=SC2086  # several words each
  $LAUNCH $WITHIN "$PYTHON" -m megagpt.train "$@" &
  step=$!
  [ -z "${asked:-}" ] || kill -USR1 "$step"
  wait_on "$step"
fi
echo "$(date "+%F %T") a start ended with code $code"
gets_on "$code" "$folder" "$before" "$id" "${asked:-}" || exit "$code"
[ -z "${LSB_JOBID:-}" ] || exit 75  # LSF queues again what ends so (-Q 75)
qsub -v "MEGAGPT_JOB=$id" "$JOB" || exit "$code"
