"""Pipeline x data x tensor parallel: the front over DeepSpeed's PipelineEngine (L2)."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe import schedule
from torch import nn

from megagpt.cluster.ranks import Ranks
from megagpt.config import RunConfig
from megagpt.engine import slices as state
from megagpt.engine.clock import COMMUNICATION
from megagpt.engine.compiler import compile_modules
from megagpt.engine.engine import Engine, LeaveOut, MicroBatch, StepResult
from megagpt.engine.optimizer import build_optimizer
from megagpt.engine.pipeline import PipelinedGPT, Targets, initialise_parts, topology
from megagpt.engine.tensor import TensorGroup, tensor_parts
from megagpt.plan.layout import Layout


class PipelineEngine(Engine):
    """Stages, tensor split and ZeRO-1 data parallel, with one micro-batch after another."""

    def __init__(
        self, config: RunConfig, layout: Layout, ranks: Ranks, ds_config: dict[str, Any]
    ) -> None:
        import deepspeed

        super().__init__(config, layout, ranks)
        targets = Targets()
        model = PipelinedGPT(config, layout, tensor_parts(self._tensor_group()), targets)
        self.names = list(model.named(layout, ranks.rank))
        initialise_parts(iter(self.names), config)
        self.deepspeed, *_ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(
                config.optimizer, ((one.name, one.parameter) for one in self.names)
            ),
            config=ds_config,
        )
        self.deepspeed.set_batch_fn(targets.stash)
        self._time_instructions()
        state.create_moments(self.deepspeed.optimizer)
        self._watch_updates()
        if config.parallel.compile:
            compile_modules([self.deepspeed.module], self.device, ranks.rank == 0)

    def _tensor_group(self) -> TensorGroup:
        """The ranks that share this rank's layers; every rank takes part in making every group."""
        own = TensorGroup(None, 0, 1)
        for members in topology(self.layout).get_axis_comm_lists("model"):
            group = dist.new_group(members)
            if self.ranks.rank in members:
                own = TensorGroup(group, members.index(self.ranks.rank), len(members))
        return own

    def train_step(
        self, batches: Sequence[MicroBatch], lr: float, step: int, leave_out: LeaveOut | None = None
    ) -> StepResult:
        engine = self.deepspeed
        self._prepare_step(len(batches), lr, step, leave_out)
        loss = float(engine.train_batch(iter(batches)))
        return self._result(loss, float(engine.get_global_grad_norm()))

    def _loss(self) -> float:
        # As train_batch itself does at its end; the update comes before that.
        return float(self.deepspeed._aggregate_total_loss())

    def _time_instructions(self) -> None:
        """The clock's parts, by the instructions of DeepSpeed's schedule."""
        parts = {
            schedule.LoadMicroBatch: "data",
            schedule.ForwardPass: "forward",
            schedule.BackwardPass: "backward",
            schedule.OptimizerStep: "optimizer",
        }
        self.deepspeed._INSTRUCTION_MAP = {
            kind: self.clock.timed(parts.get(kind, COMMUNICATION), method)
            for kind, method in self.deepspeed._INSTRUCTION_MAP.items()
        }

    def layers(self) -> dict[str, nn.Module]:
        return self.deepspeed.module.own_layers()

    @torch.no_grad()
    def evaluate(self, batches: Sequence[MicroBatch]) -> float:
        return float(self.deepspeed.eval_batch(iter(batches), num_micro_batches=len(batches)))
