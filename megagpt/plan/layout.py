"""How ranks share a run: which rank is where, and what cannot work (L0, stdlib only).

Ranks are numbered as DeepSpeed's PipeModelDataParallelTopology numbers them: the tensor split
moves fastest (neighbours share a layer, so they should share a node), then data, then pipeline.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from megagpt.config import RunConfig
from megagpt.config.bounds import around, divisors_near
from megagpt.config.presets import ModelConfig

ROW_MULTIPLE = 128
"""Rows of the output matrix on each rank come in multiples of this: products of aligned 16-bit
matrices run at full speed on every GPU so far (NVIDIA, "Matrix Multiplication Background")."""


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
        return f"{self.world} rank{'s' if self.world != 1 else ''}" + (
            f" = {split}" if split else ""
        )


def world_in(text: str) -> int:
    """The ranks that a layout's own text names; 1 where it names none."""
    found = re.match(r"(\d+) rank", text)
    return int(found[1]) if found else 1


def layout_of(config: RunConfig, world: int) -> Layout:
    """The layout of a run on `world` ranks; see layout_problems for what cannot work."""
    return Layout(world=world, pipeline=config.parallel.pipeline, tensor=config.parallel.tensor)


def micro_batch_of(config: RunConfig, layout: Layout, batch_tokens: int) -> int:
    """Sequences of each micro-batch in a step of `batch_tokens`: the most that may be used.

    The largest number up to parallel.micro_batch that divides a data rank's share of the step.
    Where the ranks cannot share the step evenly, the one that takes the ranks the shortest time.
    """
    sequences = batch_tokens // config.model.n_ctx
    most = min(config.parallel.micro_batch, sequences)
    sizes = [m for m in range(1, most + 1) if sequences % m == 0]
    return min(sizes, key=lambda m: (m * -(-sequences // (m * layout.data)), -m))


def accumulation_steps(config: RunConfig, layout: Layout, batch_tokens: int) -> int:
    """Forward and backward passes of each rank in a step of `batch_tokens`.

    Micro-batches are dealt out to the data ranks in turn. Where their number is no multiple of
    the ranks, some have none left in the last pass: they go through it with samples that weigh
    nothing, because ZeRO's collectives need every rank.
    """
    micro_batch = micro_batch_of(config, layout, batch_tokens)
    return -(-batch_tokens // (config.model.n_ctx * micro_batch * layout.data))


def idle_share(config: RunConfig, layout: Layout, batch_tokens: int) -> float:
    """Share of the ranks' passes in a step of `batch_tokens` that have nothing to learn from."""
    micro_batch = micro_batch_of(config, layout, batch_tokens)
    passes = accumulation_steps(config, layout, batch_tokens) * layout.data
    return 1.0 - batch_tokens / (config.model.n_ctx * micro_batch * passes)


def padded_model(config: RunConfig, layout: Layout) -> ModelConfig:
    """The run's model with its vocabulary padded for 16-bit tensor cores and the tensor split.

    Padding is never scored, so it changes no result but rounding; checkpoints are read with any
    padding, and consolidated weights have none.
    """
    rows = ROW_MULTIPLE if config.parallel.dtype != "fp32" else 1
    multiple = math.lcm(config.model.vocab_multiple, rows * layout.tensor)
    return dataclasses.replace(config.model, vocab_multiple=multiple)


def layout_problems(config: RunConfig, layout: Layout) -> Iterator[str]:
    """Why this run cannot go on this layout, each with its remedy; none when it can."""
    model = config.model
    share = layout.pipeline * layout.tensor
    if layout.world < 1 or layout.world % share:
        yield (
            f"{layout.world} ranks: must be a positive multiple of pipeline x tensor "
            f"({layout.pipeline} x {layout.tensor} = {share}); use "
            f"{around(max(layout.world, 1), share)}"
        )
        return
    # Earlier batches of the ramp may leave some ranks idle for a while, the last one never.
    full = config.schedule.segments[-1].batch_tokens
    if full // model.n_ctx % layout.data:
        yield _uneven(config, layout, full)
    if layout.pipeline > model.n_layer:
        yield (
            f"parallel.pipeline = {layout.pipeline}: must not be more than model.n_layer "
            f"({model.n_layer}), every stage needs a block; use {model.n_layer} or less"
        )
    both = math.gcd(model.n_head, model.d_model)
    fitting = ", ".join(str(n) for n in range(1, both + 1) if both % n == 0)
    for key in ("n_head", "d_model"):
        if getattr(model, key) % layout.tensor:
            yield (
                f"parallel.tensor = {layout.tensor}: must divide model.{key} "
                f"({getattr(model, key)}), every rank holds the same share of each layer; use one "
                f"of {fitting}"
            )
    if layout.pipelined and model.family != "gpt2":
        yield (
            f"model.family = {model.family!r}: pipeline and tensor parallel carry GPT-2 and GPT-3 "
            "only; use a zero*.json"
        )
    if layout.pipelined and model.classes:
        yield (
            f"model.classes = {model.classes}: pipeline and tensor parallel carry no classifier; "
            "use a zero*.json"
        )


def _uneven(config: RunConfig, layout: Layout, full: int) -> str:
    """The refusal of a full batch that the data ranks cannot share, with what they could."""
    sequences, share = full // config.model.n_ctx, layout.pipeline * layout.tensor
    ranks = " or ".join(f"{n * share:,}" for n in divisors_near(sequences, layout.data))
    unit = math.lcm(config.schedule.increment_tokens, config.model.n_ctx * layout.data)
    tokens = " or ".join(f"{n}" for n in (full // unit * unit, -(-full // unit) * unit) if n)
    return (
        f"schedule.batch_tokens = {config.schedule.batch_tokens}: the run's last batch has "
        f"{sequences} sequences, which must be a multiple of the {layout.data} data ranks that "
        f"share it; use {ranks} ranks, or a batch of {tokens} tokens"
    )


def busy_start_tokens(config: RunConfig, layout: Layout) -> int | None:
    """The smallest schedule.ramp_start_tokens (and increment) from the run's own on with which no
    data rank is ever idle; None where only another batch_tokens would do."""
    schedule, unit = config.schedule, config.model.n_ctx * layout.data
    first = -(-schedule.start_tokens // unit) * unit
    return next(
        (
            n
            for n in range(first, schedule.batch_tokens + 1, unit)
            if schedule.batch_tokens % n == 0
        ),
        None,
    )


def spans_hosts(layout: Layout, ranks_per_host: int) -> str:
    """What is slow about this layout on such hosts; empty where nothing is."""
    if layout.tensor == 1 or ranks_per_host % layout.tensor == 0:
        return ""
    return (
        f"parallel.tensor = {layout.tensor} does not divide the {ranks_per_host} ranks of a host, "
        "so every layer waits for the network between hosts; choose one that does"
    )
