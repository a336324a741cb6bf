#!/usr/bin/env bash
# Several hosts, no batch system:  HOSTFILE=hosts launch/multinode.sh RUN.toml [section.key=value ...]
# Needs pdsh, ssh without a password, and this folder at the same path on all hosts. Ctrl-C or TERM
# saves and stops. With --until-done before RUN.toml it starts again until the run is done.
set -euo pipefail

HOSTFILE=${HOSTFILE:-hostfile}      # a line for each host: name slots=GPUS; rank 0 is on the first
PORT=${PORT:-29500}                 # of rank 0
INTERFACE=${INTERFACE:-}            # network between the hosts; empty: each rank's way to rank 0
PAUSE=${PAUSE:-30}                  # seconds between two starts, in which hosts may come back

[ $# -ge 1 ] || { sed -n 's/^# \(.*:  \)/\1/p' "$0"; exit 2; }
# shellcheck source=launch/env.sh
. "$(dirname "$0")/env.sh"

if [ "$1" = --until-done ]; then
  shift
  folder=$(run_folder "$@") || exit 2
  asked='' start='' code=143
  # Between two starts there is nothing to stop but the pause.
  trap 'asked=1 told=1; [ -z "$start" ] || kill -TERM "$start" 2> /dev/null || true' \
    TERM INT HUP USR1 USR2 XCPU
  while [ -z "$asked" ]; do
    before=$(newest_checkpoint "$folder")
    "$0" "$@" &
    start=$!
    [ -z "$asked" ] || kill -TERM "$start" || true
    wait_on "$start"
    echo "$(date "+%F %T") a start ended with code $code"
    [ -z "$asked" ] || break
    gets_on "$code" "$folder" "$before" "$$" || exit "$code"
    export UNREACHED=75             # all hosts were there: one that is gone may come back
    sleep "$PAUSE" &
    start=$!
    wait "$start" || true
  done
  exit "$code"
fi

folder=$(run_folder "$@") || exit 2
# deepspeed's command on the other hosts is not quoted.
for path in "$PWD" "$PYTHON"; do
  [ "$path" = "$(quoted "$path")" ] || die "$path: deepspeed cannot go to a folder of such a name" \
    "on other hosts; use one of letters, digits and ._/+-, or launch/torchrun.sh on each host"
done
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"$PYTHON" -m megagpt.cluster.hostfile "$HOSTFILE" > "$scratch/hosts" || exit 2
mapfile -t hosts < <(cut -d ' ' -f 1 "$scratch/hosts")

# Every host is there, with this folder and this interpreter.
missing=$(for host in "${hosts[@]}"; do
  ssh -n -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=15 "$host" "cd '$PWD' && test -x '$PYTHON'" \
    2> /dev/null || printf '%s ' "$host" &
done; wait)
[ -z "$missing" ] || DIE=${UNREACHED:-2} die "${missing}of $HOSTFILE: ssh does not reach it, or $PWD or $PYTHON is not" \
  "there; take it out of the hostfile, or repair it"

set -m                              # what is started in a process group of its own, as deepspeed and pdsh
runner='' held=unasked
# deepspeed would stop its ranks by `pkill` on every host, which hits other runs and loses the step.
# A signal to one rank lets all of them save: rank 0, which is on the first host of the file, by the
# name that it has there. Where none can be reached, their connections end, and they save too.
# shellcheck disable=SC2329  # the trap calls it
stop() {
  local own=
  # Who held the folder before is another run; while the doctor looks there is none of this one.
  [ "$held" = unasked ] || own=$(holder)
  [ -n "$own" ] && [ "$own" != "$held" ] && ssh -n -o ConnectTimeout=10 "${hosts[0]}" kill -TERM "${own% *}" \
    || kill -KILL -- "-$runner" || true
}
# holder: process and host that the lock of the run folder names.
holder() { sed -n 's/^process \([0-9]*\) on \([^ ,]*\).*/\1 \2/p' "$folder/.lock" 2> /dev/null || true; }
trap 'told=1 asked=1; [ -z "$runner" ] || stop' TERM INT HUP USR1 USR2 XCPU
if [ "$DOCTOR" = 1 ]; then
  words=()
  for word in "$@"; do [ "$word" = --allow-changes ] || words+=("$word"); done
  "$PYTHON" -m megagpt doctor "${words[@]}" --hostfile "$scratch/hosts" > "$scratch/table" &
  runner=$!
  [ -z "${asked:-}" ] || stop
  wait_on "$runner"
  cat "$scratch/table"
  ! grep -q '^FAIL ' "$scratch/table" || DIE=1 die "see the table above"
  [ "$code" = 0 ] || exit "$code"           # words that it does not take, or a signal
fi

deepspeed_env > "$scratch/env"
export DS_ENV_FILE=$scratch/env
# The connections of this run: found by a mark that does nothing else, over when a host is gone.
mark=SendEnv=megagpt_$(basename "$scratch")
export PDSH_SSH_ARGS_APPEND="-o $mark -o ServerAliveInterval=15 -o ServerAliveCountMax=4"

# deepspeed puts words with a blank into double quotes for the shells of the other hosts, and others
# as they are.
words=()
for word in "$@"; do
  case $word in
    *\ *) word=${word//\\/\\\\} word=${word//\$/\\\$} word=${word//\`/\\\`} ;;
    *) word=$(quoted "$word") ;;
  esac
  words+=("${word//%/%%}")          # pdsh puts the host's name for %h
done
held=$(holder)
deepspeed --hostfile "$scratch/hosts" --master_addr "${hosts[0]#*@}" --master_port "$PORT" --force_multi \
  --module megagpt.train "${words[@]}" &
runner=$!
[ -z "${asked:-}" ] || stop
wait_on "$runner"
# Should deepspeed or pdsh have been killed: ranks save and end once their connection is gone.
if pkill -f -- "$mark"; then
  kill -TERM -- "-$runner" 2> /dev/null || true
fi
[ "$code" != 0 ] || complete "$@" || code=137
exit "$code"
