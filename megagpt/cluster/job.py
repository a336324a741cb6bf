"""A job script for SLURM, as a pure function of the run and what is asked for (stdlib only).

The script is launch/slurm.sbatch with other #SBATCH lines and the run's arguments written in: how
a job trains, saves, stops and is queued again stands there and nowhere else.
"""

import itertools
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megagpt.config import RunConfig
from megagpt.errors import UsageError
from megagpt.plan.memory import checkpoint_bytes

WRITE_BYTES_PER_S = 0.5e9
"""What each host is taken to write to a shared file system; most are faster."""
STEP_S = 60.0
"""A step, where none was measured."""
LEAST_LEAD_S = 120.0
"""SLURM looks at the end of jobs every minute or so."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What is asked of SLURM."""

    nodes: int
    gpus_per_node: int
    seconds: int
    """Limit of each start."""
    name: str
    cpus_per_task: int = 8
    partition: str = ""
    account: str = ""
    qos: str = ""
    requeue: bool = True
    """Queue the job again until the run is done; False for a job that is one of a chain."""


def seconds_of(text: str) -> int:
    """SLURM's time limits: minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S. Raises UsageError."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    seconds = 0
    if match:
        days, *parts = match.groups()
        numbers = [int(part) for part in parts if part is not None]
        # With days the first number is hours; without, one or two numbers begin at minutes.
        scale = 3600 if days is not None or len(numbers) == 3 else 60
        for number in numbers:
            seconds += number * scale
            scale //= 60
        seconds += 86400 * int(days or 0)
    if not seconds:
        raise UsageError(
            f"--time {text}: must be a time limit as SLURM reads it: minutes, H:M:S, D-H or D-H:M:S"
        )
    return seconds


def time_of(seconds: int) -> str:
    """A time limit as SLURM writes it: D-HH:MM:SS."""
    minutes, second = divmod(seconds, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days}-{hour:02}:{minute:02}:{second:02}"


def lead_s(config: RunConfig, job: Job, step_s: float = 0.0) -> int:
    """Seconds before the limit at which a job must be told to stop: twice a step and a save.

    step_s: the longest step that was measured; 0: none was. Raises UsageError where that leaves
    less than half of the limit for training.
    """
    save = checkpoint_bytes(config.model) / (job.nodes * WRITE_BYTES_PER_S)
    lead = 2 * ((step_s or STEP_S) + save)
    # Whole minutes: SLURM is not more exact.
    lead = 60 * -(-max(LEAST_LEAD_S, lead) // 60)
    if 2 * lead > job.seconds:
        raise UsageError(
            f"--time {time_of(job.seconds)}: a job must be told {lead:.0f} s before its end to "
            "save in time, which is more than half of it; ask for more time"
        )
    return int(lead)


# --- sweeps -------------------------------------------------------------------------------------


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
    return [[*point, f"output={output}/{_folder(point)}"] for point in itertools.product(*axes)]


def _folder(overrides: Sequence[str]) -> str:
    """peak_lr-1e-4_seed-2 for schedule.peak_lr=1e-4 and seed=2."""
    words = (one.partition("=") for one in overrides)
    joined = "_".join(f"{key.split('.')[-1]}-{value}" for key, _, value in words)
    return re.sub(r"[^\w.+-]+", "-", joined)


# --- the script ---------------------------------------------------------------------------------


def directives(job: Job, lead: int, log: str, tasks: int = 0) -> dict[str, str | None]:
    """#SBATCH options; None takes one out of the template. tasks: of an array, 0: no array."""
    found: dict[str, str | None] = {
        "job-name": job.name,
        "nodes": str(job.nodes),
        "ntasks-per-node": str(job.gpus_per_node),
        "gpus-per-node": str(job.gpus_per_node),
        "cpus-per-task": str(job.cpus_per_task),
        "time": time_of(job.seconds),
        "signal": f"B:USR1@{lead}",
        "output": log,
    }
    for name in ("partition", "account", "qos"):
        if getattr(job, name):
            found[name] = getattr(job, name)
    if tasks:
        found["array"] = f"0-{tasks - 1}"
    if not job.requeue:
        found |= {"requeue": None, "no-requeue": ""}
    return found


def script(
    template: str,
    options: Mapping[str, str | None],
    arguments: Sequence[str],
    sweep: Sequence[Sequence[str]] = (),
) -> str:
    """The template with its #SBATCH options replaced, and with the run's arguments.

    arguments: run file and overrides. sweep: further overrides of each task of an array.
    """
    left = dict(options)
    head, body = [], []
    for line in template.splitlines():
        match = re.match(r"#SBATCH --([\w-]+)", line)
        if match:
            name = match[1]
            line = _directive(name, left.pop(name)) if name in left else line
            head += [line] if line else []
        elif not head or not line.startswith("#!"):
            body.append(line)
    head += [_directive(name, value) for name, value in left.items() if value is not None]
    shebang, *body = body
    # The template's own comment tells how to call it; this job is called without arguments.
    while body[0].startswith("# "):
        body.pop(0)
    begin = body.index(BEGIN) + 1
    given = ["", *_arguments(arguments, sweep)]
    return "\n".join([shebang, NOTE, *head, *body[:begin], *given, *body[begin:]]) + "\n"


BEGIN = "set -uo pipefail"
"""The line of the template behind which its arguments are needed."""
NOTE = "# Written by `megagpt launch slurm` from launch/slurm.sbatch; submit it in the same folder."


def _directive(name: str, value: str | None) -> str:
    if value is None:
        return ""
    return f"#SBATCH --{name}" + (f"={shlex.quote(value)}" if value else "")


def _arguments(arguments: Sequence[str], sweep: Sequence[Sequence[str]]) -> list[str]:
    """Shell lines that set the script's arguments."""
    if not sweep:
        return [f"set -- {shlex.join(arguments)}"]
    cases = [f"  {i}) set -- {shlex.join([*arguments, *task])} ;;" for i, task in enumerate(sweep)]
    return ["case $SLURM_ARRAY_TASK_ID in", *cases, "esac"]
