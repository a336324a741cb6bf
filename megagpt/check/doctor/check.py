"""What an examination found, and the table that says so (stdlib only)."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

OK, WARN, FAIL = "ok", "warn", "FAIL"


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


def as_tree(report: Report) -> dict[str, Any]:
    """The report as JSON can carry it."""
    return dataclasses.asdict(report)


def from_tree(tree: dict[str, Any]) -> Report:
    """The report again."""
    checks = [Check(**check) for check in tree["checks"]]
    return Report(host=tree["host"], checks=checks, facts=tree["facts"])


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


def names(hosts: Sequence[str], most: int = 4) -> str:
    """A few names, and how many more there are."""
    more = f" and {len(hosts) - most} more" if len(hosts) > most else ""
    return ", ".join(hosts[:most]) + more


def as_text(checks: Sequence[Check]) -> str:
    """The table: a line a check, its remedy below it, and the sum at the end."""
    width = max((len(check.name) for check in checks), default=0)
    lines = []
    for check in checks:
        indent = " " * (width + 8)
        lines.append(f"{check.status:<4}  {check.name:<{width}}  " + _hung(check.detail, indent))
        if check.remedy:
            lines.append(f"{indent}-> " + _hung(check.remedy, indent + "   "))
    counts = {s: sum(check.status == s for check in checks) for s in (OK, WARN, FAIL)}
    lines.append(f"\n{counts[OK]} ok, {counts[WARN]} to know, {counts[FAIL]} failed")
    return "\n".join(lines)


def _hung(text: str, indent: str) -> str:
    """Further lines of a text below its first."""
    return text.replace("\n", "\n" + indent)


def failed(checks: Sequence[Check]) -> bool:
    """Whether training should not begin."""
    return any(check.status == FAIL for check in checks)
