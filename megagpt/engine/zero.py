"""ZeRO 0 to 3 on the plain module: one process, or data parallel (L2)."""

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from megagpt.cluster.ranks import Ranks
from megagpt.config import RunConfig
from megagpt.engine.compiler import compile_model
from megagpt.engine.device import decide
from megagpt.engine.engine import Engine, MicroBatch, SkipUpdate, StepResult
from megagpt.engine.optimizer import build_optimizer
from megagpt.engine.slices import OwnedParameter, create_moments
from megagpt.model import GPT, initialise
from megagpt.plan.layout import Layout


class ZeroEngine(Engine):
    """deepspeed.initialize around the whole model."""

    def __init__(
        self, config: RunConfig, layout: Layout, ranks: Ranks, ds_config: dict[str, Any]
    ) -> None:
        import deepspeed

        super().__init__(config, layout, ranks)
        self.stage = ds_config["zero_optimization"]["stage"]
        self.choices = decide(config, layout, self.device, self.stage, ranks.rank == 0)
        model = self._build_model(ds_config)
        self.parameters = [OwnedParameter(name=n, parameter=p) for n, p in model.named_parameters()]
        self.deepspeed, *_ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(config.optimizer, model.named_parameters()),
            config=ds_config,
        )
        create_moments(self.deepspeed.optimizer)
        if self.stage > 0:
            self._watch_updates()
        compile_model(model, self.choices.compile, whole_graphs=self.stage < 3)

    def _build_model(self, ds_config: dict[str, Any]) -> GPT:
        """The model with its initial weights; under ZeRO-3 no rank ever holds it whole."""
        import deepspeed

        config, parallel = self.config, self.config.parallel
        every = parallel.recompute_every if parallel.recompute == "full" else 0
        sharded = self.stage == 3
        place = deepspeed.zero.Init(config_dict_or_path=ds_config) if sharded else None
        with place or contextlib.nullcontext():
            model = GPT(config.model, recompute_every=every)
        for one in model.named_parameters():
            gathered = (
                deepspeed.zero.GatheredParameters([one[1]], modifier_rank=0)
                if sharded
                else contextlib.nullcontext()
            )
            with gathered:
                if not sharded or self.ranks.rank == 0:
                    initialise([one], config.model, config.seed)
        return model

    def train_step(
        self, batches: Sequence[MicroBatch], lr: float, step: int, skip: SkipUpdate | None = None
    ) -> StepResult:
        engine = self.deepspeed
        self._prepare_step(len(batches), lr, step, skip)
        engine.train()
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self._n_micro_batches = len(batches)
        for i, (x, y) in enumerate(batches):
            # DeepSpeed counts micro-steps over the whole run, so its own boundary would come too
            # early or late once the ramp has changed their number.
            engine.set_gradient_accumulation_boundary(i == len(batches) - 1)
            with self.clock.part("forward"):
                loss = engine(x.to(self.device), y.to(self.device))
            with self.clock.part("backward"):
                engine.backward(loss)
            self._loss_sum += loss.detach()
            if i < len(batches) - 1 or self.stage > 0:
                with self.clock.part("optimizer"):
                    engine.step()
        with self.clock.part("optimizer"):
            norm = self._step_stage_0() if self.stage == 0 else float(engine.get_global_grad_norm())
        return self._result(self._loss(), norm)

    def _loss(self) -> float:
        own = float(self._loss_sum) / self._n_micro_batches
        return self.total([own])[0] / self.layout.world

    def _step_stage_0(self) -> float:
        """The update without ZeRO, whose step would neither report the norm nor skip a NaN."""
        engine = self.deepspeed
        grads = [p.grad for p in engine.module.parameters() if p.grad is not None]
        norms = [torch.linalg.vector_norm(grad, dtype=torch.float64) for grad in grads]
        norm = float(torch.linalg.vector_norm(torch.stack(norms)))
        if math.isfinite(norm) and not self._refuses(norm):
            engine.step()
        else:
            engine.zero_grad()
        return norm

    def layers(self) -> dict[str, nn.Module]:
        model = self.deepspeed.module
        blocks = {f"h.{i}": block for i, block in enumerate(model.h)}
        return {"wte": model.wte, "wpe": model.wpe, **blocks, "ln_f": model.ln_f}

    @torch.no_grad()
    def evaluate(self, batches: Sequence[MicroBatch]) -> float:
        self.deepspeed.eval()
        losses = [float(self.deepspeed(x.to(self.device), y.to(self.device))) for x, y in batches]
        self.deepspeed.train()
        totals = self.total([sum(losses), float(len(losses))])
        return totals[0] / totals[1]
