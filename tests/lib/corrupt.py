"""Trains a run file, and changes one weight on one rank by hand after a step.

torchrun --nproc-per-node 2 -m tests.lib.corrupt RUN.toml RANK STEP NAME
"""

import sys

import torch

from megagpt import train


class Corrupted(train.Trainer):
    """Training on hardware that flips the lowest bit of one weight."""

    def step(self) -> None:
        rank, step, name = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
        train.check_replicas = self.flip if self.at.progress.step + 1 == step else checked
        self.place = (rank, name)
        super().step()

    def flip(self, engine: object, step: int) -> None:
        """Right before the comparison, when no update can repair it."""
        rank, name = self.place
        if self.ranks.rank == rank:
            weight = next(one.parameter for one in self.engine.parameters if one.name == name)
            bits = {2: torch.int16, 4: torch.int32}[weight.element_size()]
            weight.data.view(-1).view(bits)[-1] ^= 1
        checked(self.engine, step)


checked = train.check_replicas

if __name__ == "__main__":
    train.Trainer = Corrupted  # type: ignore[misc]
    sys.exit(train.main(sys.argv[1:2]))
