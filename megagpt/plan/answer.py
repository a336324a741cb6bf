"""Everything that `megagpt plan` answers, as text and as JSON (L0)."""

import dataclasses
import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megagpt.config.flops import flops_per_token, parameters, pf_days
from megagpt.plan.corpora import missing
from megagpt.plan.disk import checkpoint_bytes, checkpoints_kept
from megagpt.plan.drawing import draw
from megagpt.plan.failures import Outlook, Storm, outlooks
from megagpt.plan.judge import Judgement, decided_by, ramp_days, with_higher_start
from megagpt.plan.launch_files import write_plan
from megagpt.plan.ramp import idle_as_text, ramp, ramp_as_text, stage_rows, stages_as_text
from megagpt.plan.sanity import disk, epochs_of, oddities
from megagpt.plan.told import judgement_as_text, outlooks_as_text, search_as_text


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What was found for one run file."""

    file: str
    found: Sequence[Judgement]
    """The run file's own layout, or those of a search, best first."""
    searched: bool
    judged: bool
    """Whether devices were named; else only what holds on any is told."""
    outlooks: Sequence[Outlook] = ()
    wrote: Sequence[Path] = field(default_factory=list)

    @property
    def best(self) -> Judgement:
        """The layout that is told in full."""
        return self.found[0]

    def with_more(self, storm: Storm | None, picture: str | None, folder: str | None) -> "Answer":
        """The same with failures, a picture and files, where they are asked for.

        Raises UsageError for a run that never ends and for what cannot be written.
        """
        found = outlooks(self.best, storm, datetime.date.today()) if storm else []
        wrote = []
        if picture:
            draw(self.best, Path(picture))
            wrote.append(Path(picture))
        if folder:
            wrote += write_plan(self.best, Path(folder))
        return dataclasses.replace(self, outlooks=found, wrote=wrote)

    def as_text(self) -> str:
        """As a person reads it, long tables shortened."""
        parts = [search_as_text(self.found) if self.searched else self._run_as_text()]
        bare = "nothing is judged without --gpus N --gpu NAME"
        parts += ["", judgement_as_text(self.best) if self.judged else bare]
        if self.outlooks:
            parts.append(outlooks_as_text(self.outlooks))
        return "\n".join([*parts, *(f"wrote {path}" for path in self.wrote)])

    def _run_as_text(self) -> str:
        """Model, schedule and ramp, whatever the device."""
        one = self.best.candidate
        config, layout, schedule = one.config, one.layout, one.config.schedule
        rows = ramp(config, layout)
        held = max(self.best.stages, key=lambda stage: sum(stage.values()))
        states = sum(held[name] for name in ("weights", "gradients", "optimizer"))
        flops = flops_per_token(config.model) * schedule.end_tokens
        days = pf_days(parameters(config.model), schedule.end_tokens)
        parts = [
            f"{self.file}: {parameters(config.model):,} parameters, {config.model.n_layer} layers",
            f"layout: {layout}, ZeRO stage {one.zero}, "
            f"micro-batch up to {config.parallel.micro_batch}, {config.parallel.dtype}",
            f"memory: {states / 1e9:.3g} GB on the fullest rank for weights, gradients and "
            f"optimizer, {(held['activations'] + held['logits']) / 1e9:.3g} GB for activations and "
            f"logits with micro-batches of {rows[-1].micro_batch}",
            f"run: {schedule.end_tokens:,} tokens in {schedule.n_steps:,} steps, {flops:.3e} model "
            f"FLOPs, {days:,.3g} PF-days (6 a parameter and token)",
            disk(config),
            *(f"note: {text}" for text in self._notes()),
            "",
        ]
        if layout.pipeline > 1:
            parts += [stages_as_text(config, layout), ""]
        parts.append(ramp_as_text(rows))
        if idle := idle_as_text(config, layout, rows):
            parts += ["", idle]
        return "\n".join(parts)

    def as_json(self) -> dict[str, object]:
        """All of it as JSON's types, with nothing shortened; of the best layout where there are
        several."""
        config, layout = self.best.candidate.config, self.best.candidate.layout
        rows, tokens = ramp(config, layout), config.schedule.end_tokens
        higher = with_higher_start(self.best) if self.judged else None
        start = higher and higher.candidate.config.schedule.ramp_start_tokens
        return {
            "file": self.file,
            "layout": str(layout),
            "parameters": parameters(config.model),
            "tokens": tokens,
            "steps": config.schedule.n_steps,
            "flops": flops_per_token(config.model) * tokens,
            "pf_days": pf_days(parameters(config.model), tokens),
            "checkpoint_bytes": checkpoint_bytes(config.model),
            "checkpoints_kept": checkpoints_kept(config),
            "epochs": dict(epochs_of(config)),
            "notes": self._notes(),
            "stages": [dataclasses.asdict(row) for row in stage_rows(config, layout)],
            "ramp": [dataclasses.asdict(row) for row in rows],
            "idle": idle_as_text(config, layout, rows),
            "ramp_days": ramp_days(self.best) if self.judged else None,
            "higher_start": higher and {"ramp_start_tokens": start, "days": higher.days},
            "layouts": [self._judgement(one) for one in self.found] if self.judged else [],
            "simulation": [dataclasses.asdict(one) for one in self.outlooks],
            "wrote": [str(path) for path in self.wrote],
        }

    def _notes(self) -> list[str]:
        """What is odd about the run, and what training will miss."""
        config = self.best.candidate.config
        absent = ", ".join(missing(config))
        text = f"{absent}: no prepared corpus there, and training will refuse to begin without it"
        return [*oddities(config), *([text] if absent else [])]

    def _judgement(self, one: Judgement) -> dict[str, object]:
        """One layout, and what it loses to the first by."""
        if one is self.best:
            return one.as_json()
        item, seconds = decided_by(one, self.best)
        return one.as_json() | {"loses_by": item, "loses_seconds": seconds}
