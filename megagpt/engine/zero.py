"""ZeRO 0 to 3 on the plain module: one process, or data parallel (L2)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megagpt.cluster.ranks import Ranks
from megagpt.config import RunConfig
from megagpt.engine.engine import Engine, MicroBatch
from megagpt.engine.slices import OwnedParameter
from megagpt.model import GPT, initialise
from megagpt.plan.layout import Layout, padded_model


class ZeroEngine(Engine):
    """deepspeed.initialize around the whole model."""

    def __init__(
        self, config: RunConfig, layout: Layout, ranks: Ranks, ds_config: dict[str, Any]
    ) -> None:
        super().__init__(config, layout, ranks, ds_config)
        model = self._build_model(ds_config)
        parameters = [OwnedParameter(name=n, parameter=p) for n, p in model.named_parameters()]
        self._start(model, parameters, ds_config)

    def _build_model(self, ds_config: dict[str, Any]) -> GPT:
        """The model with its initial weights; under ZeRO-3 no rank ever holds it whole."""
        import deepspeed

        config, parallel = self.config, self.config.parallel
        shape = padded_model(config, self.layout)
        every = parallel.recompute_every if parallel.recompute == "full" else 0
        if self.stage < 3:
            model = GPT(shape, recompute_every=every)
            initialise(model.named_parameters(), config.model, config.seed)
            return model
        # Each parameter is cut as it is built, gathered for rank 0 to fill, and cut again.
        with deepspeed.zero.Init(config_dict_or_path=ds_config):
            model = GPT(shape, recompute_every=every)
        for name, parameter in model.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                if self.ranks.rank == 0:
                    initialise([(name, parameter)], config.model, config.seed)
        return model

    def _train(self, batches: Sequence[MicroBatch], weights: list[float]) -> tuple[float, float]:
        engine = self.deepspeed
        engine.train()
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self._n_micro_batches = len(batches)
        for i, (batch, weight) in enumerate(zip(batches, weights, strict=True)):
            # DeepSpeed counts micro-steps over the whole run, so its own boundary would come too
            # early or late once the ramp has changed their number.
            engine.set_gradient_accumulation_boundary(i == len(batches) - 1)
            with self.clock.part("forward"):
                loss = self._forward(batch, weight)
            with self.clock.part("backward"):
                engine.backward(loss)
            self._loss_sum += loss.detach()
            if i < len(batches) - 1 or self.stage > 0:
                with self.clock.part("optimizer"):
                    engine.step()
        with self.clock.part("optimizer"):
            norm = self._step_stage_0() if self.stage == 0 else float(engine.get_global_grad_norm())
        return self._loss(), norm

    def _forward(self, batch: MicroBatch, weight: float) -> Tensor:
        """The weighed loss; from pinned memory the copies run behind what the GPU still does."""
        x, y = (part.to(self.device, non_blocking=True) for part in batch)
        loss: Tensor = self.deepspeed(x, y)
        return loss if weight == 1.0 else loss * weight

    def _loss(self) -> float:
        mean = float(self._loss_sum) / self._n_micro_batches
        return self.total([mean])[0] / self.layout.world

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

    def _evaluate(self, batches: Sequence[MicroBatch], weights: list[float]) -> float:
        self.deepspeed.eval()
        # Added up on the device: a float of each loss would wait for the GPU each time.
        losses = [self._forward(b, w).double() for b, w in zip(batches, weights, strict=True)]
        self.deepspeed.train()
        mean = float(torch.stack(losses).mean())
        return self.total([mean])[0] / self.layout.world
