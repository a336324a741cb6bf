"""Numbers as a person reads them (L1, stdlib only)."""

from collections.abc import Sequence
from itertools import pairwise


def duration(seconds: float | None) -> str:
    """The two leading units of a duration: "3 d 4 h", "12 min 5 s", "?" for None."""
    if seconds is None:
        return "?"
    whole = round(seconds)
    units = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))
    for (size, name), (small, small_name) in zip(units, units[1:], strict=False):
        if whole >= size:
            rest = whole % size // small
            return f"{whole // size} {name}" + (f" {rest} {small_name}" if rest else "")
    return f"{whole} s"


def amount(number: float, figures: int = 3) -> str:
    """A number in a few figures: 0.25, 512, 32.8k, 1.25M, 300B; below a thousandth 2.5e-4."""
    if 0 < abs(number) < 1e-3:
        return scientific(number, figures)
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        # 999.96k would print as 1000k.
        if abs(number) >= size * (1 - 0.5 * 10**-figures):
            return f"{number / size:.{figures}g}{unit}"
    return f"{number:.{figures}g}"


def amounts(numbers: Sequence[float]) -> list[str]:
    """The labels of an axis: in as few figures as tell each number, and so tell them apart. What
    the steps of an axis leave of zero (1e-17) is 0."""
    step = min((b - a for a, b in pairwise(sorted(set(numbers)))), default=0.0)
    numbers = [0.0 if abs(number) < 1e-9 * step else number for number in numbers]
    figures = 4
    while figures < 16 and any(abs(float(f"{n:.{figures}g}") - n) > 0.01 * step for n in numbers):
        figures += 1
    # One way of writing for all: 5e-4 and 1e-3, not 5e-4 and 0.001.
    sizes = [abs(number) for number in numbers if number]
    small = bool(sizes) and min(sizes) < 1e-3 and max(sizes) < 1
    return [scientific(n, figures) if small else amount(n, figures) for n in numbers]


def scientific(value: float, figures: int = 3) -> str:
    """A learning rate as papers print it: 6e-4, 2.5e-4."""
    mantissa, exponent = f"{value:.{figures - 1}e}".split("e")
    return f"{float(mantissa)!r}".removesuffix(".0") + f"e{int(exponent)}" if value else "0"
