"""What several hosts found, compared: what must be the same, and the clocks."""

from collections.abc import Sequence
from dataclasses import dataclass

from megagpt.check.doctor.check import FAIL, OK, WARN, Check, Report
from megagpt.cluster.agreement import disagreements

GPUS = "GPUs"
"""The fact in which hosts may differ, at a price."""
DRIFT_S = 1.0
"""Clocks that are further apart make logs hard to read."""
BROKEN_S = 10.0
"""Clocks that are further apart let ranks disagree about the end of a job's time."""


def check_same(reports: Sequence[Report]) -> list[Check]:
    """One check for each fact in which hosts differ; one that all is well where there is none."""
    checks = []
    for problem in disagreements([r.host for r in reports], [r.facts for r in reports]):
        if problem.startswith(GPUS):
            remedy = "train on hosts of one kind: the slowest GPU sets the pace"
            checks.append(Check("same on all", WARN, problem, remedy))
        else:
            remedy = "give every host the same checkout, packages, run file and shards"
            checks.append(Check("same on all", FAIL, problem, remedy))
    names = dict.fromkeys(name for report in reports for name in report.facts)
    return checks or [Check("same on all", OK, ", ".join(names))]


@dataclass(frozen=True, slots=True)
class Clock:
    """How far a host's clock is ahead of rank 0's, in seconds, and how sure that is."""

    host: str
    ahead_s: float
    within_s: float


def offset(host: str, exchanges: Sequence[tuple[float, float, float]]) -> Clock:
    """From (asked, the host's time, answered) by rank 0's clock; the quickest exchange counts."""
    asked, there, answered = min(exchanges, key=lambda e: e[2] - e[0])
    return Clock(host, there - (asked + answered) / 2, (answered - asked) / 2)


def check_clocks(clocks: Sequence[Clock]) -> Check:
    """The hosts' clocks agree, as far as that was measured."""
    off = {c.host: c.ahead_s for c in clocks if abs(c.ahead_s) - c.within_s > DRIFT_S}
    if off:
        told = ", ".join(f"{host} {ahead:+.1f} s" for host, ahead in off.items())
        status = FAIL if max(map(abs, off.values())) > BROKEN_S else WARN
        return Check("clocks", status, f"{told} against rank 0", "run chrony or ntpd on every host")
    worst = max((abs(c.ahead_s) + c.within_s for c in clocks), default=0.0)
    return Check("clocks", OK, f"within {max(worst, 0.001):.3f} s")
