"""Goodput of the campaigns of ten_days.py beside what `megagpt plan --simulate` predicts.

    python -m tests.virtual.ten_days --seeds 20 --limit-s 9000 > seeds.jsonl
    python -m tests.virtual.goodput seeds.jsonl

Each seed is predicted from the other seeds alone: seconds of a step and of saving, and what a
restart costs, its least as --restart-minutes and what is above on average as --queue-minutes;
failures and preemptions, which save first, come as ten_days.py draws them. Twice: in the hosts' own
seconds, where starting again costs most of the time, and in the days that the campaign stands for,
20 minutes a step, where what is lost since the last checkpoint counts too. Prints the table of
docs/how-to/planner.md.
"""

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megagpt.plan.simulate import Weather, simulate
from tests.virtual.ten_days import KINDS, MEAN_STEPS

SAVED_EVERY = 2
"""Steps between two checkpoints."""
STEP_S = 1200.0
"""What a step stands for."""


def predicted(others: Sequence[dict[str, Any]], steps: int, in_days: bool) -> tuple[float, ...]:
    """10%, 50% and 90% of the simulated goodput of a campaign of `steps`."""
    done = sum(one["steps"] for one in others)
    step = sum(one["useful_s"] for one in others) / done
    # Waiting for checkpoints, and what lies between two steps, such as writing the record.
    between = sum(_training_s(one) for one in others) / done - step
    down = [seconds for one in others for seconds in one["down_s"]]
    behind = statistics.mean(one["save_s"] for one in others)
    if in_days:
        behind *= STEP_S / (step + between)
        step, between = STEP_S, 0.0
    weather = Weather(
        failure_every=MEAN_STEPS * (step + between) / (1 - KINDS["preempted"]),
        notice_every=MEAN_STEPS * (step + between) / KINDS["preempted"],
        save=SAVED_EVERY * between,
        behind=behind,
        restart=min(down),
        queue=statistics.mean(down) - min(down),
    )
    run = simulate(steps * step, SAVED_EVERY * step, weather)
    return run.middle(run.goodput)


def _training_s(one: dict[str, Any]) -> float:
    """Seconds in which the ranks trained steps that count."""
    again = sum(one["lost_steps"]) * one["useful_s"] / one["steps"]
    return float(one["wall_s"] - sum(one["down_s"]) - again)


def measured(one: dict[str, Any], in_days: bool) -> float:
    """Time of the steps that count over all of it."""
    if not in_days:
        return float(one["useful_s"] / one["seconds"])
    # A failure comes half a step after the last whole one, on average; who is preempted ends it.
    lost = sum(one["lost_steps"]) + 0.5 * (
        len(one["lost_steps"]) - one["failures"].get("preempted", 0)
    )
    return float(one["steps"] / (one["steps"] + lost + sum(one["down_s"]) / STEP_S))


def main() -> None:
    """Prints a line for each seed that ended well."""
    text = "\n".join(Path(name).read_text() for name in sys.argv[1:])
    found = [json.loads(line) for line in text.splitlines() if line]
    found = [one for one in found if "wrong" not in one]
    inside = [0, 0]
    print("| seed | failures | restarts | hosts' seconds: predicted | measured | days: predicted | "
          "measured |\n|---|---|---|---|---|---|---|")  # fmt: skip
    for one in found:
        others = [other for other in found if other is not one]
        cells = []
        for n in (0, 1):
            low, mid, high = predicted(others, one["steps"], bool(n))
            share = measured(one, bool(n))
            inside[n] += low <= share <= high
            cells += [f"{mid:.1%} ({low:.1%} to {high:.1%})", f"{share:.1%}"]
        failures = sum(one["failures"].values())
        print(f"| {one['seed']} | {failures} | {one['restarts']} | " + " | ".join(cells) + " |")
    print(f"{inside[0]} and {inside[1]} of {len(found)} within the 80% interval")


if __name__ == "__main__":
    main()
