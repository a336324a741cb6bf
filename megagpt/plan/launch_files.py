"""A layout as files to start: run file, DeepSpeed's JSON, a job script (L0)."""

import dataclasses
import json
import shlex
import sys
from pathlib import Path

from megagpt.config import dump_run
from megagpt.errors import UsageError
from megagpt.files import shipped, write_file
from megagpt.plan.ds_config import read_ds_config
from megagpt.plan.judge import Judgement


def write_plan(one: Judgement, folder: Path) -> list[Path]:
    """Writes run.toml, ds_config.json, plan.json and job.sbatch; returns their paths.

    The run file names the JSON by its path; what the run decides stays "auto" in it. Raises
    UsageError for devices that are no whole nodes and a folder that cannot be written.
    """
    cluster = one.cluster
    nodes = -(-cluster.gpus // cluster.per_node)
    if cluster.gpus > cluster.per_node and cluster.gpus % cluster.per_node:
        raise UsageError(
            f"--write: {cluster.gpus} GPUs are no whole nodes of {cluster.per_node}; name another "
            "--gpus-per-node"
        )
    folder = folder.resolve()
    config = one.candidate.config
    tree = read_ds_config(config.parallel.ds_config)
    parallel = dataclasses.replace(config.parallel, ds_config=str(folder / "ds_config.json"))
    each = cluster.gpus // nodes
    job = f"""#!/usr/bin/env bash
#SBATCH --job-name=megagpt
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={each}
#SBATCH --gpus-per-node={each}
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# {one.candidate}: {one.days:,.3g} days are predicted.
export PYTHON=${{PYTHON:-{shlex.quote(sys.executable)}}}
export MEGAGPT_LAUNCH={shlex.quote(str(shipped("launch")))}
exec bash "$MEGAGPT_LAUNCH/slurm.sbatch" {shlex.quote(str(folder / "run.toml"))} "$@"
"""
    texts = {
        "run.toml": dump_run(dataclasses.replace(config, parallel=parallel)),
        "ds_config.json": json.dumps(tree, indent=2) + "\n",
        "plan.json": json.dumps(one.as_json(), indent=1) + "\n",
        "job.sbatch": job,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_file(folder / name, text)
    except OSError as error:
        raise UsageError(f"--write {folder}: cannot be written: {error.strerror}") from None
    return [folder / name for name in texts]
