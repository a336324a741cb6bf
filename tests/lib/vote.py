"""Trains a run file's first step, whose update only the last rank wants to leave out.

torchrun --nproc-per-node 2 -m tests.lib.vote RUN.toml
"""

import os
import sys

import torch

from megagpt.cluster.process import join, leave, prepare_environment
from megagpt.cluster.ranks import discover
from megagpt.config import load_run
from megagpt.engine import build_engine
from megagpt.engine.slices import STATES
from megagpt.plan.ds_config import read_ds_config, resolve
from megagpt.plan.layout import layout_of


def main(file: str) -> None:
    ranks = discover(os.environ)
    prepare_environment(ranks, os.environ)
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    join(ranks)
    config = load_run(file)
    layout = layout_of(config, ranks.world)
    ds_config = resolve(config, layout, read_ds_config(config.parallel.ds_config))
    engine = build_engine(config, layout, ranks, ds_config)

    def state() -> list[torch.Tensor]:
        return [one.read(key).detach().clone() for one in engine.slices() for key in STATES]

    draw = torch.Generator().manual_seed(ranks.rank)
    tokens = torch.randint(0, 257, (2, config.model.n_ctx + 1), generator=draw)
    before = state()
    last = ranks.rank == ranks.world - 1
    batch = (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    result = engine.train_step([batch], 1e-3, 0, lambda *_: last)
    same = all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    found = engine.gather((result.skipped, same, engine.optimizer_state().updates))
    if ranks.rank == 0:
        print(found)
    engine.close()
    leave()


if __name__ == "__main__":
    main(sys.argv[1])
