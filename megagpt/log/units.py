"""Numbers as a person reads them (L1, stdlib only)."""


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
        return scientific(number)
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        # 999.96k would print as 1000k.
        if abs(number) >= size * (1 - 0.5 * 10**-figures):
            return f"{number / size:.{figures}g}{unit}"
    return f"{number:.{figures}g}"


def scientific(value: float) -> str:
    """A learning rate as papers print it: 6e-4, 2.5e-4."""
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}" if value else "0"
