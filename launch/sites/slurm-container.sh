# shellcheck shell=bash disable=SC2034
# A SLURM site where Python is in a container: copy to launch/site.sh and adapt.
image=/project/images/megagpt.sif
PYTHON=${PYTHON:-python3}
# Apptainer: in front of the interpreter, on every rank and where the job reads the run file. With
# STAGE, bind STAGE_TO as well.
WITHIN="apptainer exec --nv --bind $PWD $image"
# Enroot with Pyxis instead: srun opens the container, and the batch script its own for the run file.
# SRUN="--container-image=$image --container-mounts=$PWD --container-workdir=$PWD"
# READER="enroot start --mount $PWD:$PWD $image"
