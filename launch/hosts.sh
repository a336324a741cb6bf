# shellcheck shell=bash
# Hosts on which starts fail are left out of the next one, in jobs of SLURM. Sourced by slurm.sh.
# RUN/failed_hosts.txt has a line for each failure: the host, the time, what failed. Who takes lines
# out takes the host back.

EXCLUDE_AFTER=${EXCLUDE_AFTER:-2}             # failures of a host in one run; 0: none is left out
SPARE=${SPARE:-0}                             # hosts of a job that take the place of those that fail

# blame FOLDER HOST WHY [TIMES]
blame() {
  local i
  for ((i = 0; i < ${4:-1}; i++)); do echo "$2 $(date '+%F %T') $3"; done >> "$1/failed_hosts.txt"
  echo "$(date '+%F %T') $2: $3"
}

# failed_hosts FOLDER: those that have failed so often that they are left out, one a line.
failed_hosts() {
  [ "$EXCLUDE_AFTER" -gt 0 ] && [ -r "$1/failed_hosts.txt" ] || return 0
  awk -v most="$EXCLUDE_AFTER" '++n[$1] == most { print $1 }' "$1/failed_hosts.txt"
}

# new_failed_hosts FOLDER ID: the same, unless there are too few hosts without them, or SLURM was told
# of them for this job before.
new_failed_hosts() {
  local failed others
  failed=$(failed_hosts "$1")
  # SLURM refuses a list with a name that it does not know, such as one of another site.
  [ -n "$failed" ] && failed=$(sinfo -ahN -o %N | sort -u | grep -xF "$failed") || return 0
  [ "$2 $(echo "$failed" | paste -sd ,)" != "$(cat "$1/.left_out" 2> /dev/null)" ] || return 0
  others=$(sinfo -h -N -p "$SLURM_JOB_PARTITION" -t idle,alloc,mix,comp -o %N | sort -u \
    | comm -23 - <(echo "$failed") | wc -l)
  if [ "$others" -ge "$SLURM_JOB_NUM_NODES" ]; then
    echo "$failed"
  else
    echo "too few hosts without those that failed: $(echo "$failed" | paste -sd ,)" >&2
  fi
}

# fit_hosts FOLDER: those of the job that answer and have not failed too often, one a line.
fit_hosts() {
  slurm_hosts | grep -xF -f <(sinfo -h -N -n "$SLURM_JOB_NODELIST" -t idle,alloc,mix,comp -o %N) \
    | grep -vxF -f <(failed_hosts "$1")
}

# has_spare FOLDER: whether as many hosts of a job with spare ones are fit as train. An address of the
# site's file is that of the first one.
has_spare() {
  local fit
  [ "$SPARE" -gt 0 ] || return 1
  fit=$(fit_hosts "$1")
  [ "$(wc -w <<< "$fit")" -ge "$((SLURM_JOB_NUM_NODES - SPARE))" ] || return 1
  [ -z "${MASTER_ADDR:-}" ] || [ "${fit%%$'\n'*}" = "$(slurm_hosts | head -n 1)" ]
}

# step_hosts FOLDER: srun's options for a step on all hosts but the spare ones, fit ones first.
step_hosts() {
  local hosts count=$((SLURM_JOB_NUM_NODES - SPARE))
  hosts=$({ fit_hosts "$1"; slurm_hosts; } | awk '!n[$0]++' | head -n "$count" | paste -sd ,)
  echo "--nodes=$count --ntasks=$((count * ${SLURM_NTASKS_PER_NODE:-1})) --nodelist=$hosts"
}

# blame_by_srun FOLDER FILE [ALONE]: what srun says of a start that failed. The first task that a signal
# ended is the culprit: srun ends the others, by TERM and then by KILL. A task that ended by itself may
# have waited in vain for another, so it is none; but where each works ALONE, and no other failed.
blame_by_srun() {
  local line host
  while read -r line; do
    if [[ $line =~ ^srun:\ error:\ Node\ failure\ on\ ([A-Za-z0-9_.-]+)$ ]]; then
      blame "$1" "${BASH_REMATCH[1]}" "lost, says SLURM"
      return
    elif [[ $line =~ ^srun:\ error:\ ([^:\ ]+):\ tasks?\ [0-9,-]+:\ (.*)$ ]]; then
      host=${BASH_REMATCH[1]} line=${BASH_REMATCH[2]}
      case $line in
        Terminated*) return ;;
        Exited*) [ -n "${3:-}" ] && [ "$(wc -l < "$2")" = 1 ] || return ;;
      esac
      # Of several hosts in one line none is known to be the first.
      case $host in *[!A-Za-z0-9_.-]*) return ;; esac
      blame "$1" "$host" "a rank ended: $line"
      return
    fi
  done < "$2"
}

# blame_lost FOLDER ID: hosts whose SLURM has started anew since a start of this job that ended without
# a word, because its own script was on the host that was lost. Since a start of an earlier job a site
# may have renewed all of its hosts.
blame_lost() {
  local of began hosts host since
  [ -r "$1/.start" ] && read -r of began hosts < "$1/.start" && [ "$of" = "$2" ] || return 0
  for host in $hosts; do
    since=$(scontrol show node "$host" | sed -n 's/.*SlurmdStartTime=\([^ ]*\).*/\1/p')
    since=$(date -d "${since:-none}" +%s 2> /dev/null) || continue
    [ "$since" -le "$began" ] || blame "$1" "$host" "restarted during a start"
  done
}

# leave_out FOLDER ID: the waiting job ID gets no host that failed too often.
leave_out() {
  local failed given
  failed=$(new_failed_hosts "$1" "$2" | paste -sd ,)
  [ -n "$failed" ] || return 0
  echo "$2 $failed" > "$1/.left_out"
  # What the job was submitted with stays.
  given=$(scontrol show job "$2" | sed -n 's/.* ExcNodeList=\([^ ]*\).*/\1/p' | grep -vF '(null)')
  scontrol update JobId="$2" ExcNodeList="${given:+$given,}$failed" && echo "left out: $failed"
}

# examine FOLDER SAID COMMAND...: the doctor on all hosts, by the same command (see a_step). A host on
# which something fails is left out at once; 1 then, and where nothing is said of a host. Where nothing
# failed, what the command ended with: 2 for words that the doctor does not take.
examine() {
  local folder=$1 said=$2 words=() word code=0 table host
  shift 2
  for word in "$@"; do
    case $word in --allow-changes) ;; megagpt.train) words+=(megagpt.doctor) ;; *) words+=("$word") ;; esac
  done
  table=$(mktemp -q)
  a_step "$said" "${words[@]}" > >(tee "$table") 2>&1 || code=$?
  for host in $(slurm_hosts); do
    if grep -E '^([0-9]+: )?FAIL ' "$table" | grep -qE " ${host}(\.[A-Za-z0-9.-]+)?[:,]"; then
      blame "$folder" "$host" "failed the doctor's examination" "$EXCLUDE_AFTER"
      code=1
    fi
  done
  grep -qE '^([0-9]+: )?FAIL ' "$table" && code=1
  rm -f "$table"
  return "$code"
}
