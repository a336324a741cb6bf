"""One training step under several layouts, for what the optimizer is given.

    torchrun --nproc-per-node 2 -m tests.lib.one_step RUN.toml OUT '[["zero1", 1, 1, 12, 1], ...]'

Each entry is [ds_config, pipeline, tensor, sequences of the step, sequences of a micro-batch]; the
rest overrides the run file. The results go to OUT/0.pt, OUT/1.pt ...: loss, gradient norm, loss of
an evaluation of the same samples, and of each parameter the mean gradient of the step in fp32.
"""

import json
import os
import sys
from pathlib import Path

import torch

from megagpt.cluster.process import join, leave, prepare_environment
from megagpt.cluster.ranks import discover
from megagpt.config import load_run
from megagpt.engine import Engine, build_engine
from megagpt.engine.engine import MicroBatch
from megagpt.plan.ds_config import read_ds_config, resolve
from megagpt.plan.layout import layout_of

BETA = "optimizer.betas=[0.5, 0.95]"
"""So that Adam's first moment after one step is half the gradient, without rounding."""


def micro_batch(number: int, size: int) -> MicroBatch:
    """The micro-batch of this number of the step, the same tokens however it is cut."""
    rows = [torch.Generator().manual_seed(number * size + row) for row in range(size)]
    tokens = torch.stack([torch.randint(0, 257, (33,), generator=row) for row in rows])
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def gradients(engine: Engine) -> dict[str, torch.Tensor]:
    """The gradient of each element that some rank owns, by parameter, in pieces by their start."""
    owned = [
        (f"{s.name} {s.split.part} {s.start:09d}", 2.0 * s.read("exp_avg").detach().clone())
        for s in engine.slices()
        if s.owned
    ]
    pieces = dict(sorted(pair for of_rank in engine.gather(owned) for pair in of_rank))
    names = dict.fromkeys(key.rpartition(" ")[0] for key in pieces)
    return {n: torch.cat([v for k, v in pieces.items() if k.startswith(f"{n} ")]) for n in names}


def main(file: str, out: str, layouts: list[list]) -> None:
    ranks = discover(os.environ)
    prepare_environment(ranks, os.environ)
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    join(ranks)
    for index, (name, pipeline, tensor, sequences, size, *overrides) in enumerate(layouts):
        split = [f"parallel.pipeline={pipeline}", f"parallel.tensor={tensor}"]
        words = [BETA, "optimizer.gradient_clipping=0", f"parallel.ds_config={name}", *split]
        config = load_run(file, [*words, *overrides])
        layout = layout_of(config, ranks.world)
        tree = resolve(config, layout, read_ds_config(name))
        engine = build_engine(config, layout, ranks, tree)
        count = sequences // size
        numbers = range(layout.data_rank(ranks.rank), -(-count // layout.data) * layout.data)
        batches = [micro_batch(n % count, size) for n in numbers[:: layout.data]]
        evaluated = engine.evaluate(batches, sequences)
        result = engine.train_step(batches, 1e-3, 0, sequences=sequences)
        found = gradients(engine)
        if ranks.rank == 0:
            torch.save((result.loss, result.grad_norm, evaluated, found), Path(out) / f"{index}.pt")
        engine.close()
    leave()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
