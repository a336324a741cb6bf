"""Jobs for PBS and LSF, as pure functions of the same facts (stdlib only).

How a job trains, saves, stops and is queued again stands in launch/batch.sh; what is written here
holds the system's options and the run's arguments. Kubernetes: megagpt/submit/pods.py.
"""

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megagpt.errors import UsageError
from megagpt.submit.job import LAUNCH

OWN = {"PBS": r"l(.*\b)?(select|nodes|walltime)=", "BSUB": r"(n|nnodes|W)(?![A-Za-z])"}
"""Options that no --option may change: the run was checked for them."""
START_S = 180
"""Seconds of a job's time that pass before its ranks count theirs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What a job is, whatever the system."""

    name: str
    nodes: int
    gpus: int
    """Of a node, and so its ranks."""
    cores: int
    """Of a rank."""
    seconds: int
    """Limit of each start."""
    lead: int
    """Seconds before the limit at which a job must be told to stop."""
    folder: Path
    """The run folder, absolute."""
    arguments: Sequence[str]
    """Run file and overrides."""
    own_minutes: float = 0.0
    """checkpoint.stop_after_minutes of the run itself; 0: none."""
    queue: str = ""
    account: str = ""
    options: Sequence[str] = ()
    """Further lines of options, as the system reads them."""

    @property
    def words(self) -> list[str]:
        """The run's arguments, with the time after which the ranks save and stop by themselves."""
        minutes = max(1, (self.seconds - START_S) // 60)
        if 0 < self.own_minutes <= minutes:
            return list(self.arguments)
        return [*self.arguments, f"checkpoint.stop_after_minutes={minutes}"]

    @property
    def clock(self) -> str:
        """The limit as H:MM:SS."""
        minutes, seconds = divmod(self.seconds, 60)
        return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def plain(text: str, also: str = ":@%") -> str:
    """A value in a line of options, which PBS and LSF split at blanks. also: "" for the name of a
    log, of which PBS takes what is before a colon for a host, and LSF replaces %J. Raises
    UsageError."""
    if not re.fullmatch(rf"[\w./{also}+,=-]+", text, re.ASCII):
        raise UsageError(
            f"{text!r}: a name or path in a job of this system must be of letters, digits and "
            "._/+-; choose another"
        )
    return text


def pbs(facts: Facts) -> str:
    """The script of a job of PBS."""
    chunk = f"ncpus={facts.gpus * facts.cores}:ngpus={facts.gpus}:mpiprocs={facts.gpus}"
    lines = [
        f"-N {plain(facts.name)}",
        f"-l select={facts.nodes}:{chunk}",
        f"-l walltime={facts.clock}",
        "-j oe",
        f"-o {plain(str(facts.folder / 'job.log'), '')}",
    ]
    return _script("PBS", "pbs", lines, facts)


def lsf(facts: Facts) -> str:
    """The script of a job of LSF, which queues again what ends with code 75."""
    lines = [
        f"-J {plain(facts.name)}",
        f"-n {facts.nodes * facts.gpus}",
        f'-R "span[ptile={facts.gpus}] affinity[core({facts.cores})]"',
        f'-gpu "num={facts.gpus}"',
        f"-W {facts.seconds // 60}",
        f"-o {plain(str(facts.folder / 'job.log'), '')}",
        "-r",
        '-Q "75"',
        "-wa USR2",
        f"-wt {facts.lead // 60}",
    ]
    return _script("BSUB", "lsf", lines, facts)


def _script(mark: str, system: str, lines: Sequence[str], facts: Facts) -> str:
    more = {"q": facts.queue, {"PBS": "A", "BSUB": "P"}[mark]: facts.account}
    given = [f"-{name} {plain(value)}" for name, value in more.items() if value]
    lines = [*lines, *given, *facts.options]
    for line in lines:
        if not line.isprintable():
            raise UsageError(f"{line!r}: an option must be one line without control characters")
        if line in facts.options and re.search(r"(^|\s)-" + OWN[mark], line):
            raise UsageError(f"--option {line!r}: nodes, ranks and time have options of their own")
    job = shlex.quote(str(facts.folder / f"job.{system}"))
    python, launch = shlex.quote(sys.executable), shlex.quote(str(LAUNCH))
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            *(f"#{mark} {line}" for line in lines),
            f"# Written by `megagpt launch {system}`; submit it in the same folder.",
            f"set -- {shlex.join(facts.words)}",
            f"export RANKS={facts.nodes * facts.gpus} PER_HOST={facts.gpus} CORES={facts.cores}",
            f"export JOB={job} PYTHON=${{PYTHON:-{python}}} MEGAGPT_LAUNCH={launch}",
            "# shellcheck source=/dev/null",
            '. "$MEGAGPT_LAUNCH/batch.sh"',
            "",
        ]
    )
