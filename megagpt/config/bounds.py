"""Kinds of values that many keys share; a bound of one key alone stands beside it (L0).

annotated_types and not pydantic's Field, because every command imports this and few read a run.
"""

import unicodedata
from typing import Annotated

from annotated_types import Interval, MinLen, Predicate

_FAR = 100_000
"""How far from a value its neighbours are looked for."""
_TOML_MAX = 2**63 - 1
"""Integers beyond 64 bits are no TOML, so a run folder could not hold them."""


def _one_line(text: str) -> bool:
    """Whether no character of `text` would break a line of a log or act on a terminal."""
    return not any(unicodedata.category(character) == "Cc" for character in text)


OneOrMore = Annotated[int, Interval(ge=1, le=_TOML_MAX)]
ZeroOrMore = Annotated[int, Interval(ge=0, le=_TOML_MAX)]
Size = Annotated[int, Interval(ge=1, le=2**31 - 1)]
"""One dimension of a tensor, or of how a run is split."""
Minutes = Annotated[float, Interval(ge=0, le=1e6)]
"""Two years at most: timers of the operating system end there."""
Line = Annotated[str, Predicate(_one_line)]
FileName = Annotated[str, MinLen(1), Predicate(_one_line)]
"""A name or path of a file or folder."""


def divisors_near(number: int, value: int) -> list[int]:
    """The divisors of `number` next to a value: the largest up to it, the smallest above it."""
    value = min(value, number)
    below = (n for n in range(value, max(0, value - _FAR), -1) if number % n == 0)
    above = (n for n in range(value + 1, min(number, value + _FAR) + 1) if number % n == 0)
    return sorted({next(below, 1), next(above, number)})


def around(value: int, unit: int) -> str:
    """The multiples of `unit` next to a value: "2048 or 4096", but once where both are one."""
    return " or ".join(str(n) for n in sorted({value - value % unit, value + -value % unit}) if n)
