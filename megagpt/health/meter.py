"""Everything that is measured around a step, whatever the layout (L2)."""

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megagpt.config import RunConfig
from megagpt.engine import Engine, StepResult
from megagpt.engine.clock import REST
from megagpt.health.activations import Activations
from megagpt.health.noise import MicroBatchNorms, NoiseScale, sample
from megagpt.health.norms import Norms, layer_names
from megagpt.health.usage import Speed, memory, reset_peak_memory
from megagpt.log.profile import Profile
from megagpt.plan.layout import Layout, micro_batch_of


class Meter:
    """Call `begin` and `end` around each step, on all ranks; nothing of the step is changed."""

    def __init__(self, config: RunConfig, layout: Layout, engine: Engine) -> None:
        self.config, self.layout, self.engine = config, layout, engine
        self.speed = Speed(config, layout, engine.peak_tflops)
        self.profile = _profile(config, layout, engine.ranks.rank)
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
        if self.profile is not None:
            self.profile.begin(step)
        reset_peak_memory(self.engine.device)
        self.engine.clock.begin()
        self._step, self._t0 = step, time.perf_counter()

    def end(self, result: StepResult, batch_tokens: int, lr: float) -> dict[str, Any]:
        """The figures of the step that has just ended, by their name in metrics.jsonl."""
        parts = self.engine.clock.seconds()
        record: dict[str, Any] = self.speed.record(batch_tokens, time.perf_counter() - self._t0)
        record |= {f"{part}_s": seconds for part, seconds in parts.items() if part != REST}
        record |= memory(self.engine.device)
        if self.engine.loss_scale is not None:
            record["loss_scale"] = self.engine.loss_scale
        self.table = self.profile.end(self._step) if self.profile is not None else None
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
        return self.profile.close() if self.profile is not None else None


class Details:
    """A closer look at one step: every layer's norms and activations, and the gradient noise."""

    def __init__(self, config: RunConfig, engine: Engine) -> None:
        self.config = config
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


def _profile(config: RunConfig, layout: Layout, rank: int) -> Profile | None:
    """The profile that the run file asks for, on one rank of each pipeline stage."""
    steps = config.log.profile_steps
    if not steps or layout.data_rank(rank) or layout.tensor_rank(rank):
        return None
    return Profile(Path(config.output), first_step=steps[0], last_step=steps[1], rank=rank)
