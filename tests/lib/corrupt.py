"""Trains a run file, and changes one weight on one rank by hand after a step.

torchrun --nproc-per-node 2 -m tests.lib.corrupt RUN.toml RANK STEP NAME
"""

import sys

import torch

from megagpt import loop, train
from megagpt.engine import StepResult
from megagpt.run.state import RunState, Step


class Corrupted(loop.Trainer):
    """Training on hardware that flips the lowest bit of one weight."""

    def train_step(self, run: RunState, step: Step) -> StepResult:
        rank, number, name = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
        loop.check_replicas = self.flip if step.number == number else checked
        self.place = (rank, name)
        return super().train_step(run, step)

    def flip(self, engine: object, step: int) -> None:
        """Right before the comparison, when no update can repair it."""
        rank, name = self.place
        if self.ranks.rank == rank:
            weight = next(one.parameter for one in self.engine.parameters if one.name == name)
            bits = {2: torch.int16, 4: torch.int32}[weight.element_size()]
            weight.data.view(-1).view(bits)[-1] ^= 1
        checked(self.engine, step)


checked = loop.check_replicas

if __name__ == "__main__":
    loop.Trainer = Corrupted  # type: ignore[misc]
    sys.exit(train.main(sys.argv[1:2]))
