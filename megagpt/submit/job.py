"""A job script for SLURM, as a pure function of the run and what is asked for (stdlib only).

The script holds sbatch's options and the run's arguments, and hands them to launch/slurm.sbatch:
how a job trains, saves, stops and is queued again stands there and nowhere else.
"""

import itertools
import json
import re
import shlex
import sys
from collections.abc import Sequence

from megagpt.config import RunConfig
from megagpt.errors import UsageError
from megagpt.files import shipped
from megagpt.plan.disk import WRITE_RATE, checkpoint_bytes

LAUNCH = shipped("launch")
"""The folder of slurm.sbatch, which does what a job does."""
STEP_S = 60.0
"""A step, where none was measured."""
LEAST_LEAD_S = 120.0
"""SLURM looks at the end of jobs every minute or so."""


def seconds_of(text: str) -> int:
    """SLURM's time limits: minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S. Raises UsageError."""
    match = re.fullmatch(r"(?:(\d{1,9})-)?(\d{1,9})(?::(\d{1,9}))?(?::(\d{1,9}))?", text)
    days, *parts = match.groups() if match else ("0", "0")
    numbers = [int(part) for part in parts if part]
    # With days the first number is hours; without, one or two numbers begin at minutes.
    units = (3600, 60, 1) if days is not None or len(numbers) == 3 else (60, 1)
    seconds = 86400 * int(days or 0) + sum(
        n * unit for n, unit in zip(numbers, units, strict=False)
    )
    if not seconds:
        raise UsageError(
            f"--time {text:.100}: must be a time limit as SLURM reads it: minutes, H:M:S, D-H or "
            "D-H:M:S"
        )
    return seconds


def lead_s(
    config: RunConfig, nodes: int, time: str, step_s: float = 0.0, save_s: float = 0.0
) -> int:
    """Seconds before the limit `time` at which a job must be told to stop: twice a step and a save.

    step_s, save_s: the longest step and save that were measured; 0: none was. Raises UsageError
    where that leaves less than half of the limit for training.
    """
    save_s = save_s or checkpoint_bytes(config.model) / (nodes * WRITE_RATE)
    lead = 2 * ((step_s or STEP_S) + save_s)
    # Whole minutes: SLURM is not more exact.
    lead = 60 * -(-max(LEAST_LEAD_S, lead) // 60)
    if 2 * lead > seconds_of(time):
        raise UsageError(
            f"--time {time}: a job must be told {lead:.0f} s before its end to save in time, which "
            "is more than half of it; ask for more time"
        )
    return int(lead)


def sweep_of(options: Sequence[str], output: str) -> list[list[str]]:
    """Every combination of `section.key=value,value,...` as overrides, with a folder of its own.

    The last option changes fastest. Raises UsageError for an option of another form.
    """
    axes = []
    for option in options:
        key, equals, values = option.partition("=")
        # Commas within brackets belong to a list, which is one value.
        parts = re.findall(r"(?:\[[^\]]*\]|[^,\[])+", values)
        if not equals or not key or not parts or key == "output":
            raise UsageError(
                f"--sweep {option}: must be section.key=value,value,... of a key other than output"
            )
        axes.append([f"{key}={part}" for part in parts])
    points = list(itertools.product(*axes))
    folders = [_folder(point) for point in points]
    # Values that a name cannot tell apart.
    folders = [f"{n}_{name}" if folders.count(name) > 1 else name for n, name in enumerate(folders)]
    return [
        [*point, "output=" + toml(f"{output}/{name}")]
        for point, name in zip(points, folders, strict=True)
    ]


def toml(text: str) -> str:
    """A text as the value of an override: bare where it reads as no other value of TOML."""
    bare = re.fullmatch(r"[\w./+-]*/[\w./+-]*", text)
    # A basic string of TOML is one of JSON, for text without control characters.
    return text if bare else json.dumps(text, ensure_ascii=False)


def directive(text: str) -> str:
    """A value as sbatch reads it in a line of options; plain ones stay as they are.

    Unlike a shell, sbatch takes a backslash before any character, within quotes of either kind
    too, and a blank ends the value even behind one. Raises UsageError for what no quotes keep in
    its line.
    """
    if not text.isprintable():
        raise UsageError(
            f"{text!r}: a name or path in a job must be one line of UTF-8 without control "
            "characters; choose another"
        )
    if re.fullmatch(r"[\w./:@%+,=-]+", text):
        return text
    return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'


def pattern(path: str) -> str:
    """A path as sbatch reads the name of a log, where %j and its like are replaced."""
    if "\\" in path:
        raise UsageError(
            f"{path!r}: SLURM replaces nothing in the name of a log that has a backslash; choose "
            "another output"
        )
    return path.replace("%", "%%")


def _folder(overrides: Sequence[str]) -> str:
    """peak_lr-1e-4_seed-2 for schedule.peak_lr=1e-4 and seed=2."""
    pairs = (override.partition("=") for override in overrides)
    joined = "_".join(f"{key.split('.')[-1]}-{value}" for key, _, value in pairs)
    return re.sub(r"[^\w.+-]+", "-", joined)


def script(
    options: dict[str, str], arguments: list[str], sweep: Sequence[list[str]] = (), spare: int = 0
) -> str:
    """The job script.

    options: sbatch's long options, "" for those without a value. arguments: run file and
    overrides. sweep: further overrides of each task of an array. spare: of the nodes.
    """
    lines = [
        f"#SBATCH --{name}" + (f"={directive(value)}" if value else "")
        for name, value in options.items()
    ]
    if spare:
        lines.append(f"export SPARE={spare}")
    if sweep:
        lines.append("case $SLURM_ARRAY_TASK_ID in")
        for index, overrides in enumerate(sweep):
            lines.append(f"  {index}) set -- {shlex.join([*arguments, *overrides])} ;;")
        lines.append("esac")
    else:
        lines.append(f"set -- {shlex.join(arguments)}")
    python, launch = shlex.quote(sys.executable), shlex.quote(str(LAUNCH))
    return SCRIPT.format(lines="\n".join(lines), python=python, launch=launch)


SCRIPT = """#!/usr/bin/env bash
# Written by `megagpt launch slurm`; submit it in the same folder.
{lines}
trap 'asked=1' USR1 USR2 XCPU
export PYTHON=${{PYTHON:-{python}}} MEGAGPT_LAUNCH={launch}
# shellcheck source=/dev/null
. "$MEGAGPT_LAUNCH/slurm.sbatch"
"""
