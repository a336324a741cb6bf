"""How ranks share a run: which rank is where, and what cannot work (L0, stdlib only).

Ranks are numbered as DeepSpeed's PipeModelDataParallelTopology numbers them: the tensor split
moves fastest (neighbours share a layer, so they should share a node), then data, then pipeline.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

from megagpt.config import RunConfig
from megagpt.config.presets import ModelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """`world` ranks as pipeline x data x tensor."""

    world: int = 1
    pipeline: int = 1
    tensor: int = 1

    @property
    def data(self) -> int:
        """Data-parallel size: ranks that read different samples of a step."""
        return self.world // (self.pipeline * self.tensor)

    def stage(self, rank: int) -> int:
        """Pipeline stage of a rank."""
        return rank // (self.data * self.tensor)

    def data_rank(self, rank: int) -> int:
        """Which slice of every step's samples a rank reads."""
        return rank // self.tensor % self.data

    def tensor_rank(self, rank: int) -> int:
        """Which part of each layer's matrices a rank holds."""
        return rank % self.tensor

    @property
    def pipelined(self) -> bool:
        """Whether DeepSpeed's pipeline engine carries the run (tensor parallel does too)."""
        return self.pipeline > 1 or self.tensor > 1

    def __str__(self) -> str:
        parts = [("pipeline", self.pipeline), ("data", self.data), ("tensor", self.tensor)]
        split = " x ".join(f"{name} {n}" for name, n in parts if n > 1)
        return f"{self.world} rank{'s' if self.world > 1 else ''}" + (
            f" = {split}" if split else ""
        )


def layout_of(config: RunConfig, world: int) -> Layout:
    """The layout of a run on `world` ranks; see layout_problems for what cannot work."""
    return Layout(world=world, pipeline=config.parallel.pipeline, tensor=config.parallel.tensor)


def accumulation_steps(config: RunConfig, layout: Layout, batch_tokens: int) -> int:
    """Forward and backward passes of each rank in a step of `batch_tokens`."""
    sequences = batch_tokens // config.model.n_ctx
    return sequences // (layout.data * config.parallel.micro_batch)


def padded_model(config: RunConfig, layout: Layout) -> ModelConfig:
    """The run's model with its vocabulary padded so that the tensor split shares it out evenly.

    Padding is never scored, so it changes no result; checkpoints are read with any padding.
    """
    multiple = math.lcm(config.model.vocab_multiple, layout.tensor)
    return dataclasses.replace(config.model, vocab_multiple=multiple)


def layout_problems(config: RunConfig, layout: Layout) -> Iterator[str]:
    """Why this run cannot go on this layout, each with its remedy; none when it can."""
    model, parallel = config.model, config.parallel
    share = layout.pipeline * layout.tensor
    if layout.world < 1 or layout.world % share:
        yield (
            f"{layout.world} ranks: must be a positive multiple of pipeline x tensor "
            f"({layout.pipeline} x {layout.tensor} = {share})"
        )
        return
    increment = config.schedule.increment_tokens // model.n_ctx
    if increment % (layout.data * parallel.micro_batch):
        yield (
            f"schedule.ramp_increment_tokens = {config.schedule.increment_tokens} ({increment} "
            f"sequences): must be a multiple of data ranks x micro_batch ({layout.data} x "
            f"{parallel.micro_batch}), so that every batch of the ramp divides evenly; lower "
            "parallel.micro_batch, use fewer data ranks, or raise schedule.ramp_start_tokens"
        )
    if layout.pipeline > model.n_layer:
        yield (
            f"parallel.pipeline = {layout.pipeline}: must not be more than model.n_layer "
            f"({model.n_layer}), every stage needs a block"
        )
    for key in ("n_head", "d_model"):
        if getattr(model, key) % layout.tensor:
            yield (
                f"parallel.tensor = {layout.tensor}: must divide model.{key} "
                f"({getattr(model, key)}), every rank holds the same share of each layer"
            )
    if layout.pipelined and model.family != "gpt2":
        yield (
            f"model.family = {model.family!r}: pipeline and tensor parallel carry GPT-2 and GPT-3 "
            "only; use a zero*.json"
        )


def spans_hosts(layout: Layout, ranks_per_host: int) -> str:
    """What is slow about this layout on such hosts; empty where nothing is."""
    if layout.tensor == 1 or ranks_per_host % layout.tensor == 0:
        return ""
    return (
        f"parallel.tensor = {layout.tensor} does not divide the {ranks_per_host} ranks of a host, "
        "so every layer waits for the network between hosts; choose one that does"
    )
