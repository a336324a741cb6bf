# shellcheck shell=bash disable=SC2034
# A Cray with PBS and PALS: copy to launch/site.sh and adapt.
module load PrgEnv-gnu cray-python
PYTHON=${PYTHON:-/project/megagpt/venv/bin/python}
# How a job starts its ranks; RANKS and PER_HOST are those of the job.
LAUNCH="mpiexec -n ${RANKS:-1} --ppn ${PER_HOST:-1} --cpu-bind depth --depth ${CORES:-8}"
export NCCL_NET="AWS Libfabric" # with the plugin of the site
INTERFACE=${INTERFACE:-hsn0}
