"""The learning curve of tasks: every checkpoint of a run, into its tasks.jsonl and report.html."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megagpt.checkpoint.record import list_checkpoints
from megagpt.errors import UsageError
from megagpt.files import write_durably
from megagpt.log.metrics import encode
from megagpt.report import PAGE
from megagpt.report.page import write_page
from megagpt.report.series import read_run
from megagpt.tasks.scoring import TaskResult
from megagpt.use.learned import TASKS, read_tasks

Made = tuple[list[TaskResult], dict[str, Any]]
"""(results, facts of the model)."""


def learned(run: Path, evaluate: Callable[[Path], Made]) -> Iterator[Made]:
    """What `evaluate` makes of each checkpoint of a run, oldest first; the run's TASKS holds it
    before the next one is read, in place of what it held of the same task at the same step.

    Raises UsageError for a folder that is no run with checkpoints.
    """
    folders = list_checkpoints(run)
    if not folders:
        raise UsageError(f"{run}: no checkpoint here; --all-checkpoints wants a run folder")
    for folder in folders:
        results, facts = evaluate(folder)
        lines = [_line(result, facts) for result in results]
        new = {_key(line) for line in lines}
        kept = [line for line in read_tasks(run) if _key(line) not in new]
        write_durably(run / TASKS, b"".join(encode(line) for line in (*kept, *lines)))
        yield results, facts


def draw(run: Path) -> Path:
    """Writes the run's page anew and returns it."""
    return write_page([read_run(run)], run / PAGE)


def _key(line: dict[str, Any]) -> tuple[Any, ...]:
    return line["step"], line["task"], line["figure"]


def _line(result: TaskResult, facts: dict[str, Any]) -> dict[str, Any]:
    """A task's headline at a step."""
    one = result.figures[result.headline]
    return {
        "step": facts["step"],
        "tokens": facts["tokens"],
        "task": result.task,
        "figure": result.headline,
        "value": one.value,
        "low": one.low,
        "high": one.high,
        "chance": result.chance,
        "examples": result.examples,
        "shots": list(result.shots),
    }
