"""SLURM's short forms for hosts and tasks, written out (L0, stdlib only).

    host-[a-b,03-05],login   -> host-a host-b host-03 host-04 host-05 login
    2(x3),1                  -> 2 2 2 1

Both come in the order of the hosts.
"""

import re

from megagpt.errors import UsageError

_BRACKETS = re.compile(r"([^\[\]]*)\[([^\[\]]+)\](.*)", re.DOTALL)
_RANGE = re.compile(r"([0-9]{1,9})-([0-9]{1,9})|([a-z])-([a-z])", re.IGNORECASE)
_COUNT = re.compile(r"([0-9]{1,9})(?:\(x([0-9]{1,9})\))?")


def expand_hosts(short: str) -> list[str]:
    """The names of SLURM_NODELIST and its like, in order.

    Brackets hold numbers and ranges of numbers (leading zeros are kept) or of single letters, and
    may come more than once in a name, as in rack[1-2]n[01-16]. Raises UsageError for what is none.
    """
    parts = re.findall(r"(?:[^,\[\]]|\[[^\[\]]+\])+", short)
    if not parts or ",".join(parts) != short:
        raise UsageError(f"list of hosts {short!r}: not of the form name,name[1-4,07]")
    return [name for part in parts for name in _expand(part)]


def expand_counts(short: str) -> list[int]:
    """The numbers of SLURM_STEP_TASKS_PER_NODE, one for each host.

    Raises UsageError for what is none.
    """
    counts: list[int] = []
    for part in short.split(","):
        match = _COUNT.fullmatch(part)
        if match is None:
            raise UsageError(f"tasks of the hosts {short!r}: not of the form 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _expand(name: str) -> list[str]:
    match = _BRACKETS.fullmatch(name)
    if match is None:
        return [name]
    before, inside, after = match.groups()
    middles = [middle for part in inside.split(",") for middle in _span(part)]
    return [before + middle + end for middle in middles for end in _expand(after)]


def _span(part: str) -> list[str]:
    match = _RANGE.fullmatch(part)
    if match is None:
        return [part]
    if match[1]:
        return [f"{i:0{len(match[1])}d}" for i in range(int(match[1]), int(match[2]) + 1)]
    return [chr(i) for i in range(ord(match[3]), ord(match[4]) + 1)]
