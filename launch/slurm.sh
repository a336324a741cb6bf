# shellcheck shell=bash
# What a job of SLURM does: starts, until its run is done. Sourced by the scripts beside it, after their
# parameters. Its functions share what is known of the job: `id`, its number, and `folder`, its run's;
# `before`, the newest checkpoint as a start began; `step` and `launcher`, the process that runs the ranks
# and its program; `asked`, once the job was told to stop.

# shellcheck source=launch/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
# shellcheck source=launch/hosts.sh
. "$(dirname "${BASH_SOURCE[0]}")/hosts.sh"

STAGE=${STAGE:-}                              # folders of shards that each host copies before each start
STAGE_TO=${STAGE_TO:-}                        # below this folder of its own disk

slurm_hosts() { scontrol show hostnames "$SLURM_JOB_NODELIST"; }

# among_hosts COMMAND...: whether one of the job's hosts is among those that the command prints.
among_hosts() { grep -qxF -f <("$@") <(slurm_hosts); }

slurm_port() { echo $((20000 + SLURM_JOB_ID % 12000)); }

# train_in_job RUN_FOLDER COMMAND...: runs the command. Queues the job again until the run is done; not
# when a new start would fail the same way. A job with spare hosts (SPARE) starts again by itself while
# enough are well. The script has set a trap that sets `asked`: SLURM sends USR1 before the end of the
# time, and where it is set up so, when it preempts, which may be before anything has begun.
train_in_job() {
  local code starts
  folder=$1 before='' step='' launcher=''
  shift
  # In an array this task alone: the job id of its last task means all of them.
  id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}
  trap 'asked=1 told=1; [ -z "$step" ] || tell_step' USR1 USR2 XCPU
  mkdir -p "$folder"
  [ -z "$STAGE" ] || [ -n "$STAGE_TO" ] || die "STAGE = $STAGE: needs STAGE_TO, a folder of each host's disk"
  [ "$1" = srun ] || SPARE=0                  # deepspeed takes all of its hostfile
  [ "$SPARE" = 0 ] || [ "$SPARE" -lt "$SLURM_JOB_NUM_NODES" ] \
    || die "SPARE = $SPARE of $SLURM_JOB_NUM_NODES hosts: none is left to train; ask for more hosts"
  blame_lost "$folder" "$id"
  # A start that had no time to leave hosts out.
  if ! has_spare "$folder" && among_hosts new_failed_hosts "$folder" "$id" && again; then exit 75; fi
  # SLURM has not left out what it was told to: it is told again after this start.
  ! among_hosts failed_hosts "$folder" || rm -f "$folder/.left_out"
  for ((starts = 1 + ${SLURM_RESTART_COUNT:-0}; ; starts++)); do
    before=$(newest_checkpoint "$folder") code=0
    a_start "$@" || code=$?
    echo "$(date "+%F %T") start $starts ended with code $code"
    gets_on "$code" "$folder" "$before" "$id" "${asked:-}" || exit "$code"
    if [ -n "${asked:-}" ] || [ "$code" = 75 ] || ! has_spare "$folder"; then break; fi
  done
  again || exit "$code"                       # a site that allows no requeue, a job of a chain
}

# a_start COMMAND...: one start, with its code, and whom it blames.
a_start() {
  local said words=("$@") where=() alone='' code=0
  said=$(mktemp -q)
  if [ "$SPARE" -gt 0 ]; then
    read -ra where < <(step_hosts "$folder")
    words=(srun "${where[@]}" "${@:2}")
  fi
  echo "$id $(date +%s) $(slurm_hosts | paste -sd ' ')" > "$folder/.start"
  # shellcheck disable=SC2086  # several words each
  [ -z "$STAGE" ] || a_step "$said" srun "${where[@]}" --ntasks=$((SLURM_JOB_NUM_NODES - SPARE)) \
    --ntasks-per-node=1 --label ${SRUN:-} $WITHIN "$PYTHON" -m megagpt data stage $STAGE "$STAGE_TO" \
    || code=$? alone=1
  [ "$code" != 0 ] || [ "$DOCTOR" != 1 ] || examine "$folder" "$said" "${words[@]}" || code=$?
  [ "$code" != 0 ] || a_step "$said" "${words[@]}" || code=$?
  [ "$1 $code" != "deepspeed 0" ] || complete "$@" || code=138
  case $code in 0 | 2 | 3 | 75) ;; *) [ -n "${asked:-}" ] || blame_by_srun "$folder" "$said" "$alone" ;; esac
  rm -f "$said" "$folder/.start"
  return "$code"
}

# a_step SAID COMMAND...: srun, or deepspeed by it, until it ends, with its code; 143 where the job was
# asked to stop before. What srun says against it is added to the file SAID.
a_step() {
  local said=$1 code
  shift
  [ -z "${asked:-}" ] || return 143
  launcher=$1
  # Around the process, which would otherwise be that of a shell. A disk without room ends no step.
  { "$@" & } 2> >(tee >(grep --line-buffered '^srun: error: ' >> "$said" || cat > /dev/null) >&2)
  step=$!
  [ -z "${asked:-}" ] || tell_step
  wait_on "$step"
  sleep 1                                     # for the last that it has said
  return "$code"
}

# tell_step: ranks save and end, by USR1, which srun passes on. They are told until they have: SLURM may
# not have made the step yet, nor may they listen.
tell_step() {
  while kill -0 "$step"; do
    if [ "$launcher" = deepspeed ]; then pkill -USR1 -x -P "$step" srun; else kill -USR1 "$step"; fi
    sleep 2
  done > /dev/null 2>&1 &
  back_in_time
}

# back_in_time: queues the job again a moment before its end, should ranks still save then: SLURM ends
# such a job for good.
back_in_time() {
  local end left
  # SLURM 22.05 tells a batch script of no end, and a later one of none that was changed meanwhile.
  end=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.* EndTime=\([^ ]*\).*/\1/p')
  end=$(date -d "${end:-none}" +%s 2> /dev/null) || end=${SLURM_JOB_END_TIME:-0}
  left=$((end - $(date +%s) - 20))
  [ "$left" -gt 0 ] || return 0
  {
    sleep "$left"
    kill -0 "$step" && gets_on 143 "$folder" "$before" "$id" && scontrol requeue "$id"
  } > /dev/null 2>&1 &
}

# again: queues the job again, without the hosts that failed. SLURM ends this script then. 1 where it
# does not queue this job; a SLURM that does not answer is waited for.
again() {
  trap '' TERM
  until scontrol requeue "$id"; do
    ! scontrol ping > /dev/null || return 1
    sleep "${PAUSE:-30}"
  done
  leave_out "$folder" "$id" || true
}
