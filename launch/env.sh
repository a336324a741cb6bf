# shellcheck shell=bash
# What every launch needs and people forget. Sourced by the scripts beside it, after their
# parameters; it reads PYTHON, INTERFACE and those below, and the site's own file: see launch/sites.

RETRIES=${RETRIES:-5}                         # starts in a row that may end without a new checkpoint
STAGE=${STAGE:-}                              # folders of shards that each host of a SLURM job copies
STAGE_TO=${STAGE_TO:-}                        # below this folder of its own disk before each start

die() { echo "${0##*/}: $*" >&2; exit "${DIE:-2}"; }

# The shell that called or submitted may have left these of another run; the site's file may set an
# address for this one, such as the name of rank 0's host in the fast network.
unset RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT
[ -z "${MEGAGPT_SITE:-}" ] || [ -r "$MEGAGPT_SITE" ] || die "MEGAGPT_SITE = $MEGAGPT_SITE: no such file; correct or unset it"
for site in "${MEGAGPT_SITE:-launch/site.sh}" ~/.config/megagpt/site.sh; do
  [ -r "$site" ] || continue
  # Modules and conda use variables that are not set, and commands that fail.
  flags=$-
  set +eu
  # shellcheck source=/dev/null
  . "$site"
  case $flags in *e*) set -e ;; esac
  set -u
  break
done

WITHIN=${WITHIN:-}                            # a container: words in front of the interpreter
PYTHON=${PYTHON:-$PWD/.venv/bin/python}       # the same path on every host
[ -n "$WITHIN${SRUN:-}" ] || [ -x "$PYTHON" ] || PYTHON=$(command -v python3) || die "no python3; set PYTHON to the interpreter"
BIN=$(dirname "$PYTHON")
# A job that was submitted with --export=NONE has no PATH, and srun would pass its tasks nothing.
export PATH="$BIN:${PATH:-/usr/local/bin:/usr/bin:/bin}" PYTHONUNBUFFERED=1 SLURM_EXPORT_ENV=ALL
# Extensions that DeepSpeed compiles: hosts that share a home would write over each other's.
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-/tmp/torch_extensions_$(id -un)}

ulimit -c 0                                   # no core file of a large model
ulimit -n "$(ulimit -Hn)" 2>/dev/null || true # a socket to every peer, beside the shards
ulimit -l unlimited 2>/dev/null || true       # InfiniBand pins memory

# run_folder RUN.toml [section.key=value ...]: the run's folder; a run file that is wrong ends here.
run_folder() {
  # shellcheck disable=SC2086  # several words
  ${READER:-$WITHIN} "$PYTHON" - "$@" <<'PY'
import sys
from megagpt.config import load_run
from megagpt.errors import MegagptError
try:
    print(load_run(sys.argv[1], [word for word in sys.argv[2:] if "=" in word]).output)
except MegagptError as error:
    sys.exit(f"megagpt: {error}")
PY
}

# complete COMMAND...: whether the run of a command's or script's words has come to its end. deepspeed
# ends with 0 as well where a signal has ended what it had started.
complete() {
  # shellcheck disable=SC2086  # several words
  ${READER:-$WITHIN} "$PYTHON" - "$@" <<'PY' 2> /dev/null
import sys, time
from megagpt.config import load_run
from megagpt.run.folder import finished
words = sys.argv[1:]
words = words[words.index("megagpt.train") + 1 :] if "megagpt.train" in words else words
run = load_run(words[0], [word for word in words[1:] if "=" in word])
until = time.monotonic() + 3  # a network file system may show it late
while "--dry-run" not in words and not finished(run, of_any_recipe=True):
    time.sleep(1)
    if time.monotonic() > until:
        sys.exit(1)
PY
}

# Every rank finds its own interface by its way to rank 0, unless one is named for all.
if [ -n "${INTERFACE:-}" ]; then
  export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$INTERFACE}
  export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$INTERFACE}
fi

# deepspeed_env: what a .deepspeed_env holds, with the user's own last. deepspeed hands the ranks of
# other hosts little else. A command line shows all of it to others, so nothing secret is in it.
deepspeed_env() {
  local name file
  for name in $(compgen -e); do
    case $name in
      *_TOKEN* | *SECRET* | *PASSW* | *_KEY* | *CREDENTIAL*) ;;
      PATH | LD_LIBRARY_PATH | LD_PRELOAD | TMPDIR | XDG_CACHE_HOME | TZ | LANG | LC_* \
        | OMP_* | KMP_* | MKL_* | GLOO_* | NCCL_* | RCCL_* | TORCH* | PYTORCH_* | TRITON_* | DS_* \
        | CUDA_[!V]* | HIP_[!V]* | HSA_* | ROCM_* | MIOPEN_* | FI_* | OFI_* | UCX_* | UCC_* | IBV_* | MLX5_* \
        | RDMAV_* | PSM[23]_* | I_MPI_* | OMPI_MCA_* | HF_* | HUGGINGFACE_* | TRANSFORMERS_* | TIKTOKEN_* \
        | WANDB_* | MEGAGPT_* | CC | CXX | *_CA_BUNDLE | SSL_CERT_* \
        | http_proxy | https_proxy | no_proxy | HTTP_PROXY | HTTPS_PROXY | NO_PROXY)
        # pdsh puts the host's name for %h.
        [ "$name" = DS_ENV_FILE ] || printf '%s=%s\n' "$name" "$(quoted "${!name//%/%%}")" ;;
    esac
  done
  file=${DS_ENV_FILE:-.deepspeed_env}
  [ -r ~/"$file" ] && sed -n '/^[A-Za-z_][A-Za-z_0-9]*=/p' ~/"$file"
  [ -r "$file" ] && sed -n '/^[A-Za-z_][A-Za-z_0-9]*=/p' "$file"
  return 0
}

# quoted TEXT: a text as a shell reads it in one line; plain ones stay as they are.
quoted() {
  case $1 in *[!A-Za-z0-9_./:,=+@%-]*) printf '%q' "$1" ;; *) printf '%s' "$1" ;; esac
}

# Starts that end --------------------------------------------------------------------------------

# wait_on PROCESS: until it has ended, with `code`. A signal ends a wait alone; its trap sets `told`.
wait_on() {
  while :; do
    told='' code=0
    wait "$1" || code=$?
    [ -n "$told" ] || break
  done
}

# Only "step_" and digits are a checkpoint of ours, the highest number the newest.
newest_checkpoint() {
  { find "$1/checkpoints" -maxdepth 1 -name 'step_[0-9]*' ! -name 'step_*[!0-9]*' 2>/dev/null || true; } \
    | sort -V | tail -n 1
}

# gets_on CODE RUN_FOLDER BEFORE ID [ASKED]: whether another start may get on, after one that began at
# checkpoint BEFORE and ended with CODE. What was ended from outside may be well the next time: such
# starts are counted while they save nothing, for the job ID alone. ASKED: it was told to stop.
gets_on() {
  local code=$1 folder=$2 before=$3 id=$4 asked=${5:-} of='' count=0
  case $code in 0 | 2 | 3) return 1 ;; esac   # done; wrong run file; damaged input
  if [ "$(newest_checkpoint "$folder")" != "$before" ]; then
    rm -f "$folder/.retries"
    return 0
  fi
  [ "$code" != 4 ] || return 1                # a training that goes wrong from there each time
  [ "$code" != 75 ] && [ -z "$asked" ] || return 0
  mkdir -p "$folder"
  [ ! -r "$folder/.retries" ] || read -r of count < "$folder/.retries"
  [[ $of == "$id" && $count =~ ^[0-9]+$ ]] || count=0
  if [ "$count" -ge "$RETRIES" ]; then
    echo "no checkpoint is new after $((count + 1)) starts in a row (RETRIES=$RETRIES): giving up" >&2
    return 1
  fi
  echo "$id $((count + 1))" > "$folder/.retries"
}

# Inside a job of SLURM --------------------------------------------------------------------------

slurm_hosts() { scontrol show hostnames "$SLURM_JOB_NODELIST"; }

# among_hosts COMMAND...: whether one of the job's hosts is among those that the command prints.
among_hosts() { grep -qxF -f <("$@") <(slurm_hosts); }

slurm_port() { echo $((20000 + SLURM_JOB_ID % 12000)); }

# a_step COMMAND...: srun, or deepspeed by it, until it ends with `code`. What the job is asked meanwhile,
# or was before, it is told. What srun says against it is added to the file `said`.
a_step() {
  local launcher=$1
  # Around the process, which would otherwise be that of a shell.
  { "$@" & } 2> >(tee >(grep --line-buffered '^srun: error: ' >> "$said") >&2)
  step=$!
  [ -z "${asked:-}" ] || tell_step
  wait_on "$step"
  sleep 1                                     # for the last that it has said
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

# shellcheck source=launch/hosts.sh
. "$(dirname "${BASH_SOURCE[0]}")/hosts.sh"
for name in RETRIES EXCLUDE_AFTER SPARE PAUSE; do
  [[ ${!name:-0} =~ ^(0|[1-9][0-9]*)$ ]] || die "$name = ${!name}: must be a whole number, 0 or more"
done

# train_in_job RUN_FOLDER COMMAND...: runs the command. Queues the job again until the run is done; not
# when a new start would fail the same way. A job with spare hosts (SPARE) starts again by itself while
# enough are well. The script has set a trap that sets `asked`: SLURM sends USR1 before the end of the
# time, and where it is set up so, when it preempts, which may be before anything has begun.
train_in_job() {
  local folder=$1 before code step='' told id=$SLURM_JOB_ID starts
  shift
  # In an array this task alone: the job id of its last task means all of them.
  id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$id}
  trap 'asked=1 told=1; [ -z "$step" ] || tell_step' USR1 USR2 XCPU
  mkdir -p "$folder"
  [ -z "$STAGE" ] || [ -n "$STAGE_TO" ] || die "STAGE = $STAGE: needs STAGE_TO, a folder of each host's disk"
  [ "$1" = srun ] || SPARE=0                  # deepspeed takes all of its hostfile
  [ "$SPARE" = 0 ] || [ "$SPARE" -lt "$SLURM_JOB_NUM_NODES" ] \
    || die "SPARE = $SPARE of $SLURM_JOB_NUM_NODES hosts: none is left to train; ask for more hosts"
  blame_lost "$folder" "$id"
  # A start that had no time to leave hosts out.
  if ! has_spare "$folder" && among_hosts new_failed_hosts "$folder" "$id" && again "$id" "$folder"; then
    exit 75
  fi
  # SLURM has not left out what it was told to: it is told again after this start.
  ! among_hosts failed_hosts "$folder" || rm -f "$folder/.left_out"
  for ((starts = 1 + ${SLURM_RESTART_COUNT:-0}; ; starts++)); do
    before=$(newest_checkpoint "$folder")
    start_in_job "$folder" "$@"
    echo "$(date "+%F %T") start $starts ended with code $code"
    gets_on "$code" "$folder" "$before" "$id" "${asked:-}" || exit "$code"
    if [ -n "${asked:-}" ] || [ "$code" = 75 ] || ! has_spare "$folder"; then break; fi
  done
  again "$id" "$folder" || exit "$code"       # a site that allows no requeue, a job of a chain
}

# start_in_job RUN_FOLDER COMMAND...: one start, with `code`, and whom it blames.
start_in_job() {
  local folder=$1 said unfit='' alone='' words=("${@:2}") where=()
  code=143 said=$(mktemp)
  if [ "$SPARE" -gt 0 ]; then
    read -ra where < <(step_hosts "$folder")
    words=(srun "${where[@]}" "${@:3}")
  fi
  echo "$id $(date +%s) $(slurm_hosts | paste -sd ' ')" > "$folder/.start"
  if [ -z "${asked:-}" ] && [ -n "$STAGE" ]; then
    # shellcheck disable=SC2086  # several words each
    a_step srun "${where[@]}" --ntasks=$((SLURM_JOB_NUM_NODES - SPARE)) --ntasks-per-node=1 --label \
      ${SRUN:-} $WITHIN "$PYTHON" -m megagpt data stage $STAGE "$STAGE_TO"
    unfit=${code#0} alone=$unfit
  fi
  if [ -z "${asked:-}$unfit" ] && [ "$DOCTOR" = 1 ]; then
    examine "$folder" "${words[@]}" || unfit=$?
  fi
  code=${unfit:-143}
  if [ -z "${asked:-}$unfit" ]; then
    a_step "${words[@]}"
    [ "$2 $code" != "deepspeed 0" ] || complete "$@" || code=138
  fi
  case $code in 0 | 2 | 3 | 75) ;; *) [ -n "${asked:-}" ] || blame_by_srun "$folder" "$said" "$alone" ;; esac
  rm -f "$said" "$folder/.start"
}

# again ID FOLDER: queues the job again, without the hosts that failed. SLURM ends this script then.
again() {
  trap '' TERM
  scontrol requeue "$1" || return 1
  leave_out "$2" "$1" || true
}
