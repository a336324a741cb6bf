# shellcheck shell=bash disable=SC2034
# A SLURM site with modules and two networks: copy to launch/site.sh and adapt.
module purge
module load CUDA GCC
PYTHON=${PYTHON:-/project/megagpt/venv/bin/python}  # the same path on every host
SRUN=${SRUN:---distribution=block:cyclic}           # further options of srun
STAGE_TO=${STAGE_TO:-/local/$(id -un)}              # a disk of each host, where STAGE is copied to
# Rank 0 by its name in the fast network, where that is another one, such as the host's with an i.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)i
export MASTER_ADDR
