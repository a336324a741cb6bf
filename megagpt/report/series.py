"""What a run's folder tells, as arrays and totals (numpy only)."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megagpt.config import RunConfig, load_run
from megagpt.config.flops import parameters_by_kind, pf_days
from megagpt.errors import UsageError
from megagpt.log.metrics import read_metrics

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Run:
    """The record of one run folder."""

    folder: Path
    name: str
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    events: list[dict[str, Any]]
    config: RunConfig | None
    """None where the folder has no readable config.toml."""
    facts: dict[str, Any]
    """run.json, or nothing."""

    def column(self, key: str) -> Floats:
        """A figure of every step, NaN where a step has none."""
        return column(self.steps, key)

    @property
    def tokens(self) -> Floats:
        """Tokens consumed after each step."""
        return self.column("tokens")

    @property
    def step_s(self) -> Floats:
        """Seconds of each step; NaN where the record does not tell."""
        with np.errstate(divide="ignore", invalid="ignore"):
            computed = self.column("batch_tokens") / self.column("tokens_per_s")
        measured = self.column("step_s")
        return np.where(np.isfinite(measured), measured, computed)

    @property
    def validation(self) -> tuple[Floats, Floats]:
        """(tokens, validation loss) of each evaluation."""
        return column(self.evaluations, "tokens"), column(self.evaluations, "validation_loss")

    @property
    def validation_sets(self) -> dict[str, Floats]:
        """Loss of each evaluation by validation set, where a run has several sets."""
        losses = [table(line.get("validation_losses")) for line in self.evaluations]
        names = dict.fromkeys(name for line in losses for name in line)
        return {name: column(losses, name) for name in names} if len(names) > 1 else {}

    @property
    def restarts(self) -> list[dict[str, Any]]:
        """The "resume" events, each with its cause: "restart" of the command, "rollback" of the
        run by itself, or "extension" of a run that was complete."""
        resumes: list[dict[str, Any]] = []
        for event in self.events:
            if event["event"] == "resume":
                extended = "paused_s" in event
                resumes.append(event | {"cause": "extension" if extended else "restart"})
            elif event["event"] == "rollback" and resumes:
                # The run resumed itself right before.
                resumes[-1]["cause"] = "rollback"
        return resumes

    @property
    def spikes(self) -> list[dict[str, Any]]:
        """The steps that the run recorded as spikes, and the first of any in a row whose loss is no
        number, in order: step, tokens, reason, and "spike" as their cause."""
        found = [event for event in self.events if event["event"] == "spike"]
        sound = True
        for step in self.steps:
            before, sound = sound, math.isfinite(step["loss"])
            if before and not sound:
                found.append({**step, "reason": f"loss {step['loss']:g}"})
        spikes = {one["step"]: {"reason": "", **one, "cause": "spike"} for one in found}
        return [spikes[step] for step in sorted(spikes)]

    @property
    def times(self) -> tuple[float, float] | None:
        """Seconds since 1970 of the first and the last line, None where no line tells."""
        lines = (*self.steps, *self.evaluations, *self.events)
        times = [line["time"] for line in lines if "time" in line]
        return (min(times), max(times)) if times else None

    @property
    def hours(self) -> Floats | None:
        """Hours at the end of each step since the run began, without the time in which no process
        ran; None where neither times nor the seconds of steps tell."""
        times, first = self.column("time"), self.times
        if first is None or not np.isfinite(times).all():
            hours = np.cumsum(self.step_s) / 3600
            return hours if np.isfinite(hours).all() else None
        since = times - first[0]
        for event in self.events:
            if event["event"] == "resume" and "time" in event:
                idle_s = event.get("down_s", 0.0) + event.get("paused_s", 0.0)
                since -= np.where(times >= event["time"], idle_s, 0.0)
        # A clock may be set back.
        return np.maximum.accumulate(since) / 3600

    @property
    def wall_s(self) -> float:
        """Seconds from the first line to the last, without those in which the run was complete."""
        if self.times is None:
            return 0.0
        paused_s = sum(event.get("paused_s", 0.0) for event in self.restarts)
        return max(0.0, self.times[1] - self.times[0] - paused_s)

    @property
    def goodput(self) -> float:
        """Time of the steps that count over wall time, 0 to 1; NaN where neither is known."""
        useful = float(np.nansum(self.step_s))
        return min(1.0, useful / self.wall_s) if self.wall_s and useful else math.nan

    @property
    def parameters(self) -> tuple[int, int] | None:
        """(all parameters, those outside the embeddings), None without a configuration."""
        if self.config is None:
            return None
        kinds = parameters_by_kind(self.config.model)
        embeddings = kinds["wte"] + kinds["wpe"] + kinds["head"]
        return sum(kinds.values()), sum(kinds.values()) - embeddings

    def pf_days(self, tokens: Floats) -> Floats:
        """Compute of so many tokens in PF-days without embeddings: 6 N per token with N outside
        them (Kaplan et al. 2020, section 2.1), which a configuration tells."""
        assert self.parameters is not None
        return pf_days(self.parameters[1], tokens)

    @property
    def span_steps(self) -> int:
        """Steps over which a curve is averaged."""
        n_steps = len(self.steps)
        return min(100, max(5, n_steps // 60)) if n_steps >= 24 else 1

    def smoothed(self, key: str) -> Floats:
        """A figure of every step, averaged over the steps around it."""
        return smooth(self.column(key), self.span_steps)

    def median(self, key: str) -> float:
        """Median of a figure over the steps that have it, NaN where none has."""
        values = self.column(key)
        return float(np.nanmedian(values)) if np.isfinite(values).any() else math.nan


PARTS = ("data", "forward", "backward", "communication", "optimizer")
"""The parts of a step that the engine's clock tells, which never overlap."""


def parts_of(run: Run) -> dict[str, Floats]:
    """Smoothed seconds of each part of a step and of the loop itself; nothing where no step tells
    them, NaN at steps whose own time is not known."""
    columns = {name: run.column(f"{name}_s") for name in PARTS}
    parts = {
        name: np.where(np.isfinite(values), values, 0.0)
        for name, values in columns.items()
        if np.isfinite(values).any()
    }
    if not parts:
        return {}
    parts["the loop itself"] = np.maximum(0.0, run.step_s - sum(parts.values()))
    known = np.isfinite(run.step_s)
    return {
        name: np.where(known, smooth(np.where(known, values, np.nan), run.span_steps), np.nan)
        for name, values in parts.items()
    }


def table(value: Any) -> dict[str, Any]:
    """A record of figures by name; nothing where something else stands in its place."""
    return value if isinstance(value, dict) else {}


def column(lines: Sequence[dict[str, Any]], key: str) -> Floats:
    """A figure of every line, NaN where a line has none, or something else in its place."""
    return np.array([_figure(line.get(key)) for line in lines], dtype=float)


def _figure(value: Any) -> float:
    sound = type(value) is float or (type(value) is int and abs(value) < 2**63)
    return float(value) if sound else math.nan


def read_run(folder: Path, name: str = "") -> Run:
    """The record in `folder`.

    Raises UsageError when nothing was recorded there yet, DamageError for a damaged record.
    """
    return read_facts(folder, read_metrics(folder), name)


def read_facts(folder: Path, lines: Sequence[dict[str, Any]], name: str = "") -> Run:
    """The run of `folder` whose metrics.jsonl holds `lines`; raises UsageError without a step."""
    # What is not ours has no place on the axis of a run.
    lines = [line for line in lines if _placed(line)]
    steps = [line for line in lines if "loss" in line and "event" not in line]
    if not steps:
        raise UsageError(
            f"{folder}: no training step is recorded yet; wait for the first step of the run"
        )
    return Run(
        folder=folder,
        name=name or folder.resolve().name,
        steps=steps,
        evaluations=[line for line in lines if "validation_loss" in line and "event" not in line],
        events=[line for line in lines if "event" in line],
        config=_config(folder),
        facts=_facts(folder),
    )


def _placed(line: dict[str, Any]) -> bool:
    """Whether a line says where in the run it stands."""
    step = line.get("step", 0 if "validation_loss" in line else None)
    return type(step) is int and "tokens" in line


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Several runs, each with a name of its own: as much of the path as tells them apart."""
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise UsageError("a run folder is named twice; name each once")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    names = ["/".join(path.parts[-depth:]) for path in paths]
    return [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def _config(folder: Path) -> RunConfig | None:
    path = folder / "config.toml"
    try:
        return load_run(path) if path.is_file() else None
    except UsageError:
        # A run of another version: its curves can be drawn all the same.
        return None


def _facts(folder: Path) -> dict[str, Any]:
    try:
        facts = json.loads((folder / "run.json").read_text())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def smooth(values: Floats, span_steps: int) -> Floats:
    """Mean of the values around each, with weights that fall to 1/e within `span_steps` on both
    sides, so that the curve does not lag behind; values that are not finite are left out. A run
    begins with its steepest fall and nothing before it: there the mean starts from the values.
    """
    keep = 1.0 - 1.0 / max(1, span_steps)
    known = np.isfinite(values).astype(float)
    filled = np.where(known > 0, values, 0.0)
    # What lies before each value and itself, then what lies after and itself: itself twice.
    sums = _fading(filled, keep) + _fading(filled[::-1], keep)[::-1] - filled
    weights = _fading(known, keep) + _fading(known[::-1], keep)[::-1] - known
    mean = np.divide(sums, weights, out=np.full(len(values), math.nan), where=weights > 1e-12)
    return mean + keep ** np.arange(len(values)) * np.where(known > 0, filled - mean, 0.0)


def _fading(values: Floats, keep: float) -> Floats:
    """Sum up to each row, every earlier value weighing `keep` less for each row in between."""
    return np.fromiter(accumulate(values.tolist(), lambda sum_, value: keep * sum_ + value), float)


def thin(x: Floats, y: Floats, points: int = 2000) -> tuple[Floats, Floats]:
    """At most about `points` rows: every k-th row and the last."""
    rows = np.arange(0, len(x), -(-len(x) // points) or 1)
    if len(x):
        rows = np.unique(np.append(rows, len(x) - 1))
    return x[rows], y[rows]
