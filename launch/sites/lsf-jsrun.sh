# shellcheck shell=bash disable=SC2034
# LSF with jsrun: copy to launch/site.sh and adapt.
module load cuda gcc
PYTHON=${PYTHON:-/project/megagpt/venv/bin/python}
# A resource set for each GPU; RANKS, PER_HOST and CORES are those of the job.
LAUNCH="jsrun -n ${RANKS:-1} -r ${PER_HOST:-1} -a 1 -g 1 -c ${CORES:-7} -b rs"
INTERFACE=${INTERFACE:-ib0}
