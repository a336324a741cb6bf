"""What the doctor is asked, what an examination found, and the table that says so (stdlib only)."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

OK, WARN, FAIL = "ok", "warn", "FAIL"
GPUS = "GPUs"
"""The fact in which hosts may differ, at a price."""
DRIFT_S = 1.0
"""Clocks that are further apart make logs hard to read."""
BROKEN_S = 10.0
"""Clocks that are further apart let ranks disagree about the end of a job's time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """What is to be examined, and what a host is told of the job; 0 and "" where nothing is known.

    It travels to other hosts as JSON, which makes lists of the tuples.
    """

    run: str = ""
    """Run file; empty: the machine alone."""
    overrides: Sequence[str] = ()
    full: bool = False
    """Read every byte of the shards."""
    hosts: int = 1
    ranks: int = 0
    """Of the whole job."""
    ranks_here: int = 0
    gpus_per_node: int = 0
    """Of a job that is examined before it is queued, from a host that need not be one of it."""
    master: str = ""
    """Host name or address of rank 0."""
    shared_file: Sequence[str] = ("", "")
    """Path and content of a file that was just written, which every host must see; or empty."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    status: str
    """ok, warn (worth knowing; training can begin) or FAIL (training would fail or go wrong)."""
    detail: str
    """What was found."""
    remedy: str = ""
    """What to do about it; empty where the detail says it already, or where all is well."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What one host found about itself."""

    host: str
    checks: list[Check]
    facts: dict[str, str] = field(default_factory=dict)
    """What must be the same on every host: name -> value."""
    began: float = 0.0
    """What the host's clock showed as the examination began, in seconds since 1970."""
    took_s: float = 0.0


def report_of(tree: Mapping[str, Any]) -> Report:
    """A report again, of what dataclasses.asdict made of it and JSON carried."""
    return Report(**{**tree, "checks": [Check(**check) for check in tree["checks"]]})


# --- several hosts ------------------------------------------------------------------------------


def merged(reports: Sequence[Report]) -> list[Check]:
    """The checks of all hosts, in their order; what several hosts found stands once.

    What is well need not be quite alike: one host is named as an example.
    """
    if len(reports) == 1:
        return list(reports[0].checks)
    groups: dict[object, list[tuple[str, Check]]] = {}
    order: dict[str, int] = {}
    for report in reports:
        count: Counter[str] = Counter()
        for check in report.checks:
            order.setdefault(check.name, len(order))
            key = (check.name, count[check.name]) if check.status == OK else check
            count[check.name] += 1
            groups.setdefault(key, []).append((report.host, check))
    rows = []
    for group in sorted(groups.values(), key=lambda group: order[group[0][1].name]):
        host, check = group[0]
        some = names([host for host, _ in group])
        if len(group) == len(reports):
            some = f"{len(group)} hosts"
        if any(other != check for _, other in group):
            some += f", such as {host}"
        rows.append(dataclasses.replace(check, detail=f"{some}: {check.detail}"))
    return rows


def check_same(reports: Sequence[Report]) -> list[Check]:
    """One check for each fact in which hosts differ; one that all is well where there is none."""
    from megagpt.cluster.agreement import DRIVER, disagreements

    checks = []
    for problem in disagreements([r.host for r in reports], [r.facts for r in reports]):
        status, remedy = FAIL, "give every host the same checkout, packages, run file and shards"
        if problem.startswith(GPUS):
            status, remedy = WARN, "train on hosts of one kind: the slowest GPU sets the pace"
        elif problem.startswith(DRIVER):
            status, remedy = WARN, "let the site bring all hosts to one driver"
        checks.append(Check("same on all", status, problem, remedy))
    facts = dict.fromkeys(name for report in reports for name in report.facts)
    return checks or [Check("same on all", OK, ", ".join(facts))]


def check_clocks(ahead_s: Mapping[str, float], reference: str) -> Check:
    """ahead_s: host -> seconds by which its clock is ahead of that of the reference."""
    off = {host: ahead for host, ahead in ahead_s.items() if abs(ahead) > DRIFT_S}
    if off:
        detail = ", ".join(f"{host} {ahead:+.1f} s" for host, ahead in off.items())
        status = FAIL if max(map(abs, off.values())) > BROKEN_S else WARN
        remedy = "run chrony or ntpd on every host"
        return Check("clocks", status, f"{detail} against {reference}", remedy)
    worst = max(map(abs, ahead_s.values()), default=0.0)
    return Check("clocks", OK, f"within {max(worst, 0.001):.3f} s")


# --- the table ----------------------------------------------------------------------------------


def names(hosts: Sequence[str], most: int = 4) -> str:
    """A few names, and how many more there are."""
    more = f" and {len(hosts) - most} more" if len(hosts) > most else ""
    return ", ".join(hosts[:most]) + more


def as_text(checks: Sequence[Check]) -> str:
    """The table: a line a check, its remedy below it, and the sum at the end."""
    width = max((len(check.name) for check in checks), default=0)
    indent = " " * (width + 8)
    lines = []
    for check in checks:
        # Further lines of a text hang below its first.
        detail = check.detail.replace("\n", "\n" + indent)
        lines.append(f"{check.status:<4}  {check.name:<{width}}  {detail}")
        if check.remedy:
            lines.append(f"{indent}-> " + check.remedy.replace("\n", f"\n{indent}   "))
    counts = Counter(check.status for check in checks)
    lines.append(f"\n{counts[OK]} ok, {counts[WARN]} to know, {counts[FAIL]} failed")
    return "\n".join(lines)


def failed(checks: Sequence[Check]) -> bool:
    """Whether training should not begin."""
    return any(check.status == FAIL for check in checks)
