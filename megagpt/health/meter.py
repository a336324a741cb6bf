"""Everything that is measured around a step, whatever the layout (L2)."""

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from megagpt.config import RunConfig
from megagpt.config.flops import flops_per_token
from megagpt.engine import Engine, StepResult
from megagpt.engine.clock import REST
from megagpt.health.activations import Activations
from megagpt.health.noise import MicroBatchNorms, NoiseScale, sample
from megagpt.health.norms import Norms, layer_names
from megagpt.log.profile import Profile
from megagpt.plan.layout import Layout, micro_batch_of


class Meter:
    """Call `begin` and `end` around each step, on all ranks; nothing of the step is changed."""

    def __init__(self, config: RunConfig, layout: Layout, engine: Engine) -> None:
        self.config, self.layout, self.engine = config, layout, engine
        self.speed = Speed(config, layout, engine.peak_tflops)
        # On one rank of each pipeline stage.
        rank = engine.ranks.rank
        alone = not (layout.data_rank(rank) or layout.tensor_rank(rank))
        first, last = (config.log.profile_steps if alone else ()) or (1, 0)
        self.profile = Profile(Path(config.output), first_step=first, last_step=last, rank=rank)
        self.table: str | None = None
        """The costliest operations, at the end of the last profiled step."""
        self.noise = NoiseScale()
        self._details: Details | None = None

    def recall(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Takes up the running means of a run that goes on; the rank that records needs them."""
        self.noise = NoiseScale()
        for record in records:
            self.noise.add(record)

    def begin(self, step: int) -> None:
        """Step number `step`, counted from 1, begins."""
        every = self.config.log.details_every_steps
        self._details = Details(self.config, self.engine) if every and step % every == 0 else None
        self.profile.begin(step)
        if self.engine.device.type == "cuda":
            # The peak is that of this step.
            torch.cuda.reset_peak_memory_stats(self.engine.device)
        self.engine.clock.begin()
        self._step, self._t0 = step, time.perf_counter()

    def end(self, result: StepResult, batch_tokens: int, lr: float) -> dict[str, Any]:
        """The figures of the step that has just ended, by their name in metrics.jsonl."""
        times = self.engine.clock.seconds()
        record: dict[str, Any] = self.speed.record(batch_tokens, time.perf_counter() - self._t0)
        record |= {f"{part}_s": seconds for part, seconds in times.items() if part != REST}
        record |= memory(self.engine.device)
        if self.engine.loss_scale is not None:
            record["loss_scale"] = self.engine.loss_scale
        self.table = self.profile.end(self._step)
        if self._details is not None:
            t0 = time.perf_counter()
            sequences = micro_batch_of(self.config, self.layout, batch_tokens)
            micro_tokens = sequences * self.config.model.n_ctx
            record |= self._details.end(result, batch_tokens, micro_tokens, lr)
            record |= self.noise.add(record)
            record["details_s"] = time.perf_counter() - t0
        return record

    def close(self) -> str | None:
        """Ends a profile that the run did not live to the end of; its table."""
        return self.profile.close()


class Details:
    """Statistics of one step: every layer's norms and activations, and the gradient noise."""

    def __init__(self, config: RunConfig, engine: Engine) -> None:
        self.norms = Norms(config, engine)
        # Within one graph of the whole model hooks are not called; blocks have theirs outside.
        modules = {} if engine.choices.compile == "model" else engine.layers()
        self.activations = Activations(engine, modules, layer_names(config))
        self.micro_batches = MicroBatchNorms(engine)

    def end(
        self, result: StepResult, batch_tokens: int, micro_tokens: int, lr: float
    ) -> dict[str, Any]:
        """The figures; norms and noise only of a step that was applied."""
        activations = self.activations.collect()
        record: dict[str, Any] = {"activations": activations} if activations["rms"] else {}
        small = self.micro_batches.collect(batch_tokens // micro_tokens)
        if result.applied:
            norms = self.norms.after(lr, result.grad_norm)
            whole = {key: sum(x * x for x in norms[key].values()) ** 0.5 for key in norms}
            record |= {"param_norm": whole["parameter"], "update_norm": whole["update"]}
            record["update_ratio"] = whole["update"] / whole["parameter"]
            record["norms"] = norms
            record |= sample(small, micro_tokens, norms["gradient"], batch_tokens)
        return record


class Speed:
    """Rates of a run's steps; `peak_tflops` is that of one rank's device, None: not known."""

    def __init__(self, config: RunConfig, layout: Layout, peak_tflops: float | None) -> None:
        parallel = config.parallel
        # A pipeline recomputes its blocks k at a time, but every one of them.
        every = 1 if layout.pipelined else parallel.recompute_every
        self.model_flops = flops_per_token(config.model)
        self.hardware_flops = flops_per_token(
            config.model, recompute=parallel.recompute, recompute_every=every
        )
        self.world, self.peak_tflops = layout.world, peak_tflops

    def record(self, batch_tokens: int, step_s: float) -> dict[str, float]:
        """tokens_per_s over all ranks, step_s, tflops_per_rank; mfu and hfu where there is a peak.

        mfu counts the model's mathematics, hfu what is computed again as well
        (megagpt.config.flops).
        """
        per_rank = batch_tokens / step_s / self.world / 1e12
        figures = {
            "tokens_per_s": batch_tokens / step_s,
            "step_s": step_s,
            "tflops_per_rank": self.model_flops * per_rank,
        }
        if self.peak_tflops is not None:
            figures["mfu"] = self.model_flops * per_rank / self.peak_tflops
            figures["hfu"] = self.hardware_flops * per_rank / self.peak_tflops
        return figures


def memory(device: torch.device) -> dict[str, int]:
    """Bytes of this rank: resident on the host, and on its GPU.

    allocated: in tensors as the step ends; peak: at most in tensors during the step; reserved:
    taken from the GPU by torch.
    """
    figures = {"host_memory_bytes": psutil.Process().memory_info().rss}
    if device.type == "cuda":
        figures["memory_allocated_bytes"] = torch.cuda.memory_allocated(device)
        figures["memory_peak_bytes"] = torch.cuda.max_memory_allocated(device)
        figures["memory_reserved_bytes"] = torch.cuda.memory_reserved(device)
    return figures
