"""Trains one run file under several layouts in one process after another, to spare cold starts.

    torchrun --nproc-per-node 2 -m tests.lib.reshape RUN.toml '[["from", "to", "zero3", 1, 1], ...]'

A hop is [checkpoint to begin with ("": none), output folder, ds_config, pipeline, tensor], and as
many overrides of the run file as one likes.
"""

import json
import os
import shutil
import sys
from pathlib import Path

from megagpt.cluster.process import join, leave, prepare_environment
from megagpt.cluster.ranks import Ranks, discover
from megagpt.cluster.stop import StopRequest
from megagpt.config import load_run
from megagpt.plan.ds_config import read_ds_config, resolve
from megagpt.plan.layout import layout_of


def main(file: str, hops: list[list[str]]) -> None:
    ranks = discover(os.environ)
    prepare_environment(ranks, os.environ)
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    join(ranks)
    for source, output, name, pipeline, tensor, *more in hops:
        split = [f"parallel.pipeline={pipeline}", f"parallel.tensor={tensor}"]
        train(Path(file), ranks, source, output, f"parallel.ds_config={name}", *split, *more)
    leave()


def train(file: Path, ranks: Ranks, source: str, output: str, *overrides: str) -> None:
    """One hop, to the end of the run."""
    from megagpt.loop import Trainer

    config = load_run(file, [f"output={output}", *overrides])
    if ranks.rank == 0:
        Path(output).mkdir(parents=True)
        if source:
            shutil.copytree(source, Path(output) / "checkpoints" / Path(source).name)
    layout = layout_of(config, ranks.world)
    ds_config = resolve(config, layout, read_ds_config(config.parallel.ds_config))
    trainer = Trainer(config, layout, ranks, ds_config)
    trainer.engine.barrier()
    with StopRequest() as stop:
        trainer.run(stop, allow_changes=False)
    trainer.close()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
