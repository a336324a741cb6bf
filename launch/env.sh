# shellcheck shell=bash
# What every launch needs and people forget. Sourced by the scripts beside it, after their
# parameters; it reads PYTHON, INTERFACE and those below, and the site's own file: see launch/sites.

die() { echo "${0##*/}: $*" >&2; exit "${DIE:-2}"; }

# The shell that called or submitted may have left these of another run; the site's file may set an
# address for this one, such as the name of rank 0's host in the fast network.
unset RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT
[ -z "${MEGAGPT_SITE:-}" ] || [ -r "$MEGAGPT_SITE" ] || die "MEGAGPT_SITE = $MEGAGPT_SITE: no such file; correct or unset it"
for site in "${MEGAGPT_SITE:-launch/site.sh}" ~/.config/megagpt/site.sh; do
  [ -e "$site" ] || continue
  "$BASH" -n "$site" || die "$site: the site's file cannot be read, or is no script; correct it"
  # Modules and conda use variables that are not set, and commands that fail.
  flags=$-
  set +eu
  # shellcheck source=/dev/null
  . "$site"
  case $flags in *e*) set -e ;; esac
  set -u
  break
done
RETRIES=${RETRIES:-5}                         # starts in a row that may end without a new checkpoint
DOCTOR=${DOCTOR:-0}                           # 1: the doctor examines the hosts before each start
for name in RETRIES DOCTOR EXCLUDE_AFTER SPARE PAUSE; do
  [[ ${!name:-0} =~ ^(0|[1-9][0-9]*)$ ]] || die "$name = ${!name}: must be a whole number, 0 or more"
done
# The folder that TMPDIR names may be on other hosts alone.
mktemp() { command mktemp "$@" 2> /dev/null || TMPDIR=/tmp command mktemp "$@"; }

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
    print(load_run(sys.argv[1], [w for w in sys.argv[2:] if "=" in w and w[0] != "-"]).output)
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
run = load_run(words[0], [word for word in words[1:] if "=" in word and word[0] != "-"])
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
  local name
  for name in $(compgen -e); do
    case $name in
      *_TOKEN* | *SECRET* | *PASSW* | *_KEY* | *CREDENTIAL* | DS_ENV_FILE) ;;
      PATH | LD_LIBRARY_PATH | LD_PRELOAD | TMPDIR | XDG_CACHE_HOME | TZ | LANG | LC_* \
        | OMP_* | KMP_* | MKL_* | GLOO_* | NCCL_* | RCCL_* | TORCH* | PYTORCH_* | TRITON_* | DS_* \
        | CUDA_[!V]* | HIP_[!V]* | HSA_* | ROCM_* | MIOPEN_* | FI_* | OFI_* | UCX_* | UCC_* | IBV_* | MLX5_* \
        | RDMAV_* | PSM[23]_* | I_MPI_* | OMPI_MCA_* | HF_* | HUGGINGFACE_* | TRANSFORMERS_* | TIKTOKEN_* \
        | WANDB_* | MEGAGPT_* | CC | CXX | *_CA_BUNDLE | SSL_CERT_* \
        | http_proxy | https_proxy | no_proxy | HTTP_PROXY | HTTPS_PROXY | NO_PROXY)
        # deepspeed puts what is not plain into double quotes, and pdsh the host's name for %h.
        [[ ${!name} == *$'\n'* ]] || printf '%s=%s\n' "$name" "${!name}" | sed 's/[\\"$`]/\\&/g; s/%/%%/g' ;;
    esac
  done
  users_env
}

# users_env: what the user's own .deepspeed_env say, that of this folder last.
users_env() {
  local file=${DS_ENV_FILE:-.deepspeed_env}
  sed -n 's/\r$//; /^[A-Za-z_][A-Za-z_0-9]*=/p' ~/"$file" "$file" 2> /dev/null || true
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
  local code=$1 folder=$2 before=$3 id=$4 of='' count=0
  case $code in 0 | 2 | 3) return 1 ;; esac   # done; wrong run file; damaged input
  if [ "$(newest_checkpoint "$folder")" != "$before" ]; then
    rm -f "$folder/.retries"
    return 0
  fi
  [ "$code" != 4 ] || return 1                # a training that goes wrong from there each time
  [ "$code" != 75 ] && [ -z "${5:-}" ] || return 0
  mkdir -p "$folder"
  [ ! -r "$folder/.retries" ] || read -r of count < "$folder/.retries"
  [[ $of == "$id" && $count =~ ^[0-9]+$ ]] || count=0
  if [ "$count" -ge "$RETRIES" ]; then
    echo "no checkpoint is new after $((count + 1)) starts in a row (RETRIES=$RETRIES): giving up" >&2
    return 1
  fi
  echo "$id $((count + 1))" > "$folder/.retries"
}
