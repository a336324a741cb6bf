"""What a run's checkpoints reached on tasks, as its folder keeps it (L3, without torch).

A line of tasks.jsonl is one figure at one step: step, tokens, task, figure, value, low, high,
chance. `megagpt evaluate --all-checkpoints` writes it, the report draws it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megagpt.files import write_durably
from megagpt.log.metrics import decode, encode

TASKS = "tasks.jsonl"


def is_share(figure: str) -> bool:
    """Whether a figure is an accuracy, 0 to 1."""
    return figure.startswith("acc") or figure == "exact_match"


@dataclass(frozen=True, slots=True)
class LearningCurve:
    """One figure of one task over the tokens of training."""

    task: str
    title: str
    """Of the chart that it belongs to."""
    unit: str
    tokens: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    """Accuracies in %."""
    chance: list[float] = field(default_factory=list)


def read_tasks(run: Path) -> list[dict[str, Any]]:
    """The lines of TASKS, without those that are none, in the order of training."""
    try:
        content = (run / TASKS).read_bytes()
    except OSError:
        return []
    lines = []
    for text in content.splitlines():
        try:
            line = decode(text)
        except ValueError:
            continue
        texts = (line.get("task"), line.get("figure"))
        if {"step", "tokens"} <= line.keys() and all(type(one) is str for one in texts):
            lines.append(line)
    return sorted(lines, key=lambda line: line["tokens"])


def add_tasks(run: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Writes lines into TASKS, in place of those of the same figure, task and step."""

    def key(line: dict[str, Any]) -> tuple[Any, ...]:
        return line["step"], line["task"], line["figure"]

    new = {key(line) for line in lines}
    kept = [line for line in read_tasks(run) if key(line) not in new]
    write_durably(run / TASKS, b"".join(encode(line) for line in (*kept, *lines)))


def curves(run: Path) -> list[LearningCurve]:
    """The curves of a run, in the order of its file."""
    found: dict[tuple[str, str], LearningCurve] = {}
    for line in read_tasks(run):
        share = is_share(line["figure"])
        title = "accuracy on tasks" if share else line["figure"].replace("_", " ")
        made = LearningCurve(line["task"], title, "%" if share else "")
        curve = found.setdefault((line["task"], line["figure"]), made)
        scale = 100.0 if share else 1.0
        curve.tokens.append(float(line["tokens"]))
        curve.values.append(scale * _number(line.get("value")))
        curve.chance.append(scale * _number(line.get("chance")))
    return list(found.values())


def _number(value: Any) -> float:
    return float(value) if type(value) in (int, float) and abs(value) < 2**63 else math.nan
