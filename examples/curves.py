"""The curves of docs/tutorials/examples.md: validation losses of what the other examples trained.

    python examples/curves.py --output docs/images/examples.png

Reads metrics.jsonl of the run folders in --runs, by the names that the examples give them. One that
is not there is left out, and named.
"""

import argparse
import io
import sys
from pathlib import Path

from matplotlib.figure import Figure
from training import run

from megagpt.errors import UsageError
from megagpt.files import write_durably
from megagpt.log import read_metrics

PANELS = {
    ("sort: test inputs", "nats a digit"): {"sort": ""},
    ("adder, 2 digits: test sums", "nats a digit"): {
        "adder-2": "reversed sum",
        "adder-2-forward": "sum as written (--forward)",
    },
    ("adder, 3 digits: test sums", "nats a digit"): {"adder-3": ""},
    ("chargpt: held-out tenth", "nats a byte"): {"chargpt": "default", "chargpt-long": "longer"},
}
"""(title, unit) -> run folder -> its label, "" for the only one. A loss of digits goes to 0: its
axis is logarithmic."""


def losses(folder: Path) -> list[tuple[int, float]]:
    """(step, validation loss) of each evaluation of a run; nothing where none is there."""
    try:
        records = read_metrics(folder)
    except UsageError:
        print(f"{folder}: no run here, left out", file=sys.stderr)
        return []
    return [(r["step"], r["validation_loss"]) for r in records if "validation_loss" in r]


def main() -> None:
    """Draws the curves that are there."""
    made = argparse.ArgumentParser(
        description="Draws the examples' curves.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    made.add_argument("--runs", type=Path, default=Path("runs"), help="where the run folders lie")
    made.add_argument("--output", type=Path, default=Path("examples.png"), help="picture, PNG")
    args = made.parse_args()
    figure, drawn = Figure(figsize=(9, 7), layout="tight"), 0
    for axis, ((title, unit), runs) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        axis.set(xlabel="step", ylabel=unit)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        if unit == "nats a digit":
            axis.set_yscale("log")
        else:
            axis.set_ylim(1.3, 3)
        for name, label in runs.items():
            if found := losses(args.runs / name):
                axis.plot(*zip(*found, strict=True), label=label)
                drawn += 1
        if axis.lines and len(runs) > 1:
            axis.legend(fontsize=8)
    if not drawn:
        raise UsageError(f"{args.runs}: holds no run of an example; train one, or name another")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=90)
    write_durably(args.output, content.getvalue())
    print(f"{args.output}: {drawn} of {sum(map(len, PANELS.values()))} curves")


if __name__ == "__main__":
    run(main)
