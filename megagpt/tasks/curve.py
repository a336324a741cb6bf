"""The learning curve of tasks: every checkpoint of a run, into its tasks.jsonl."""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megagpt.checkpoint.record import list_checkpoints
from megagpt.errors import UsageError
from megagpt.files import write_durably
from megagpt.log.metrics import encode
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
        **asdict(one),
        "chance": result.chance,
        "examples": result.examples,
        "shots": list(result.shots),
    }
