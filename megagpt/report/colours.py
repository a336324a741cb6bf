"""The colours of runs and lines, by day and by night (stdlib only).

Chosen by numbers, which tests/report/test_colours.py holds: a contrast of 3 or more with the paper
(WCAG 2.1, 1.4.11), and a distance between any two that those see, too, who are blind to red or
green.
"""

DAY, NIGHT_PAPER = "#ffffff", "#1b2129"
"""The papers that lines are drawn on."""
COLOURS = "#6786fa #c87d1b #17a37b #5437bd #802e2b #157aa3 #796701 #88007d".split()
TRAIN, VALIDATION, RATE, BATCH, _, STEEP = COLOURS[:6]
ALARM, GREY = "#c53030", "#7b8591"
"""Of spikes, and of what is not a run's own: restarts, published laws, guesses."""
PART_COLOURS = {
    "data": COLOURS[5],
    "forward": COLOURS[0],
    "backward": COLOURS[1],
    "communication": COLOURS[3],
    "optimizer": COLOURS[2],
    "the loop itself": GREY,
    "useful steps": COLOURS[2],
    "steps done again": COLOURS[1],
    "down": ALARM,
    "evaluation": COLOURS[0],
    "checkpoints": COLOURS[5],
    "the rest": GREY,
}
"""Of the parts of a step, and of a run's wall time."""
NIGHT = dict(
    zip(
        [*COLOURS, ALARM, GREY],
        "#387ffd #ff880a #07c58e #b9a1f9 #ab6d66 #95e6f3 #f1d83c #c73ab7 #ff6b6b #97a3af".split(),
        strict=True,
    )
)
"""Colour -> the one that stands for it on the dark paper."""


def colour_of(index: int) -> str:
    """The colour of the index-th of several lines or runs."""
    return COLOURS[index % len(COLOURS)]


def variable(colour: str) -> str:
    """The variable of the page's style that holds a colour by day and by night."""
    return f"--{colour.removeprefix('#')}"


def style() -> str:
    """The page's variables."""
    day = "".join(f"{variable(colour)}:{colour};" for colour in NIGHT)
    night = "".join(f"{variable(colour)}:{dark};" for colour, dark in NIGHT.items())
    return f":root{{{day}}}\n@media (prefers-color-scheme: dark){{:root{{{night}}}}}\n"
