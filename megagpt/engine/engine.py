"""The one front that the training loop calls, whatever the layout (L2).

A step is `train_step` on this rank's micro-batches; every rank calls it together. What DeepSpeed
does differently under ZeRO 0-3 is settled in zero.py, and for pipelines in pipeline.py.
"""

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megagpt.cluster.ranks import Ranks
from megagpt.config import RunConfig
from megagpt.engine.clock import COMMUNICATION, Clock, time_collectives
from megagpt.engine.compiler import compile_model
from megagpt.engine.device import apply, choose
from megagpt.engine.optimizer import ask_before_update, build_optimizer
from megagpt.engine.slices import (
    OptimizerState,
    OwnedParameter,
    Slice,
    create_moments,
    optimizer_slices,
    read_state,
    write_state,
)
from megagpt.errors import MegagptError
from megagpt.model.classifier import refuse_samples
from megagpt.plan.accelerators import peak_tflops
from megagpt.plan.layout import Layout

MicroBatch = tuple[Tensor, Tensor]
"""(inputs, targets), each (sequences, n_ctx) int64; a negative target is not scored."""
T = TypeVar("T")
SkipUpdate = Callable[[float, float], bool]
"""(loss, gradient norm) of a step -> whether its update is skipped."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step did, the same on every rank."""

    loss: float
    """Mean loss of the step's targets that are scored, nats; nan where there is none."""
    grad_norm: float
    """Global gradient norm before clipping; inf or nan when the step was skipped."""
    applied: bool
    """False: loss or gradients were not finite, or the update was asked to be skipped, so the
    weights, the moments and their count stay as they are."""
    scored: bool = True
    """False: masks leave the step no target, so that by right it has no loss."""

    @property
    def skipped(self) -> bool:
        """Whether the update was asked to be skipped, though loss and gradients were finite."""
        return not self.applied and math.isfinite(self.grad_norm)


class Engine(ABC):
    """A model, its optimizer and its ranks. Every method is called by all ranks together."""

    def __init__(
        self, config: RunConfig, layout: Layout, ranks: Ranks, ds_config: dict[str, Any]
    ) -> None:
        self.config = config
        self.layout = layout
        self.ranks = ranks
        if torch.cuda.is_available():
            self.device = torch.device("cuda", torch.cuda.current_device())
        else:
            self.device = torch.device("cpu")
        cuda = self.device.type == "cuda"
        self.peak_tflops = peak_tflops(torch.cuda.get_device_name()) if cuda else None
        """Peak of this rank's device in bf16, 10^12 FLOP/s; None where it is not known."""
        self.clock = Clock(self.device)
        """Times the parts of a step: forward, backward, optimizer and communication."""
        time_collectives(self.clock)
        self.parameters: list[OwnedParameter] = []
        """The parameters on this rank."""
        self.stage: int = ds_config["zero_optimization"]["stage"]
        self.choices = choose(config, layout, self.device, self.stage)
        """What computes the run on this rank."""
        apply(self.choices, first=ranks.rank == 0)
        self.deepspeed: Any = None
        """DeepSpeed's engine."""
        self.masked = False
        """Whether there are targets that are not scored: the ranks then count those that are."""
        self.scored = True
        """Whether the latest step or evaluation had a target that is scored."""
        self._skip: SkipUpdate | None = None
        self._skips: bool | None = None
        """Whether the update of the step in progress is skipped; None: not decided yet."""

    def _start(
        self,
        model: nn.Module,
        parameters: list[OwnedParameter],
        ds_config: dict[str, Any],
        whole_graphs: bool = True,
    ) -> None:
        """DeepSpeed around a model with its initial weights, of which `parameters` are on this
        rank; `whole_graphs` as compile_model takes it."""
        import deepspeed

        self.parameters = parameters
        named = ((one.name, one.parameter) for one in parameters)
        self.deepspeed, *_ = deepspeed.initialize(
            model=model, optimizer=build_optimizer(self.config.optimizer, named), config=ds_config
        )
        zero = self.deepspeed.optimizer
        create_moments(zero)
        if self.stage > 0:
            # DeepSpeed computes the norm, clips and updates in one call, but has AdamW do the
            # updating, and has published the norm by then.
            ask_before_update(zero.optimizer, lambda: self._refuses(float(zero._global_grad_norm)))
        compile_model(model, self.choices.compile, whole_graphs)

    # --- a step ---------------------------------------------------------------------------------

    def train_step(
        self,
        batches: Sequence[MicroBatch],
        lr: float,
        step: int,
        skip: SkipUpdate | None = None,
        sequences: int | None = None,
    ) -> StepResult:
        """Forward and backward over this rank's micro-batches, then one update at `lr`.

        `step` is the number of steps done before; with the seed it decides dropout. `skip` is
        asked once loss and norm are known and finite; one rank that says yes speaks for all.
        `sequences` is how many samples the step has on all ranks; None: as many as are given.
        """
        self._skip, self._skips = skip, None
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        size = len(batches[0][0])
        # The first sets the size alone; the second the gradient accumulation steps, which grow
        # with the batch ramp and by which DeepSpeed divides each loss.
        self.deepspeed.set_train_micro_batch_size(size)
        self.deepspeed.set_train_batch_size(len(batches) * size * self.layout.data)
        self._seed(step)
        loss, norm = self._train(batches, self._weights(batches, sequences))
        applied = math.isfinite(norm) and not self._skips
        return StepResult(loss, norm, applied, self.scored)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[MicroBatch], sequences: int | None = None) -> float:
        """Mean loss over the micro-batches of all ranks, dropout off; nothing is changed.

        Which samples, and when, is megagpt.run.evaluation's.
        """
        return self._evaluate(batches, self._weights(batches, sequences))

    @abstractmethod
    def _train(self, batches: Sequence[MicroBatch], weights: list[float]) -> tuple[float, float]:
        """(loss, gradient norm) of a step, whose update it makes unless that is refused."""

    @abstractmethod
    def _loss(self) -> float:
        """The loss of the step in progress, once its last backward pass is done."""

    @abstractmethod
    def _evaluate(self, batches: Sequence[MicroBatch], weights: list[float]) -> float:
        """The mean loss of all ranks."""

    def _weights(self, batches: Sequence[MicroBatch], sequences: int | None) -> list[float]:
        """What each of this rank's micro-batches counts in the mean over a step; 1 on average.

        Micro-batch i of data rank r is number i * ranks + r of the step. Those beyond the step's
        samples weigh nothing and the others more, so that the mean over ranks and passes, which
        is what DeepSpeed computes, is the mean over the samples. Of masked data each weighs as
        many targets as it scores. A step that scores none has no mean: its weights are nan, and
        its update is left out like any that is not finite.
        """
        if self.config.model.classes:
            for x, y in batches:
                refuse_samples(self.config.model, x, y)
        data, rank = self.layout.data, self.layout.data_rank(self.ranks.rank)
        size, places = len(batches[0][0]), len(batches) * data
        count = places if sequences is None else sequences // size
        numbers = range(rank, places, data)
        if not self.masked:
            return [places / count if number < count else 0.0 for number in numbers]
        scored = [
            int((y >= 0).sum()) if number < count else 0
            for number, (_, y) in zip(numbers, batches, strict=True)
        ]
        # Ranks that share a micro-batch, by a pipeline or tensor split, count it as often.
        total = int(self.total([sum(scored)])[0]) * data // self.layout.world
        self.scored = total > 0
        return [places * n / total if total else math.nan for n in scored]

    def _seed(self, step: int) -> None:
        """Seeds this step's dropout from (seed, step, data rank, stage).

        A pure function of the position in the run, so there is no generator state to save. Ranks
        that share a layer (tensor parallel) drop the same elements of the activations they share.
        """
        place = (self.layout.data_rank(self.ranks.rank), self.layout.stage(self.ranks.rank))
        torch.manual_seed(zlib.crc32(repr((self.config.seed, step, place)).encode()))

    def _refuses(self, norm: float) -> bool:
        """Whether this step's update is skipped; decided once, by all ranks together."""
        if self._skips is None:
            skip = self._skip
            self._skips = skip is not None and self.any(skip(self._loss(), norm))
        return self._skips

    # --- agreement ------------------------------------------------------------------------------

    def total(self, values: Sequence[float]) -> list[float]:
        """Sum of each value over all ranks, in float64."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def largest(self, values: Sequence[float]) -> list[float]:
        """Largest of each value over all ranks."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def _reduced(self, values: Sequence[float], by: Any) -> list[float]:
        # Apple's and a few other devices have no float64, but neither nccl nor gloo runs there.
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        with self.clock.part(COMMUNICATION):
            dist.all_reduce(tensor, op=by)
            return list(tensor.tolist())

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return self.total([float(flag)])[0] > 0

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, by rank."""
        values: list[Any] = [None] * self.ranks.world
        dist.all_gather_object(values, value)
        return values

    def collect(self, value: Any) -> list[Any]:
        """The value of every rank, by rank, on rank 0; empty on the others, which learn nothing."""
        values: list[Any] = [None] * self.ranks.world if self.ranks.rank == 0 else []
        dist.gather_object(value, values or None)
        return values

    def first(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def by_first(self, action: Callable[[], T]) -> T:
        """What rank 0 finds, on every rank: one rank looks at the disk and not all. What it raises
        of ours or of the system's, all raise."""
        value: Any = None
        problem: Exception | None = None
        if self.ranks.rank == 0:
            try:
                value = action()
            except (MegagptError, OSError) as error:
                problem = error
        value, problem = self.first((value, problem))
        if problem is not None:
            raise problem
        return cast(T, value)

    def barrier(self) -> None:
        """Waits for all ranks."""
        dist.barrier()

    # --- state ----------------------------------------------------------------------------------

    def slices(self) -> Iterator[Slice]:
        """The parts of fp32 weights and moments that this rank holds, by canonical name."""
        rank = self.layout.data_rank(self.ranks.rank)
        return optimizer_slices(self.deepspeed.optimizer, self.parameters, rank)

    @abstractmethod
    def layers(self) -> dict[str, nn.Module]:
        """The layers on this rank by canonical name, without the head."""

    @property
    def loss_scale(self) -> float | None:
        """What the loss is multiplied by under fp16; None elsewhere."""
        fp16 = self.config.parallel.dtype == "fp16"
        return float(self.deepspeed.optimizer.loss_scale) if fp16 else None

    def optimizer_state(self) -> OptimizerState:
        """Updates applied so far, and the loss scale under fp16."""
        return read_state(self.deepspeed.optimizer)

    def restore(self, saved: OptimizerState) -> None:
        """Call after every slice was written: sets the counts, copies masters into the weights."""
        write_state(self.deepspeed.optimizer, saved)

    def close(self) -> None:
        """Frees the engine; the process group stays."""
        self.deepspeed.destroy()
