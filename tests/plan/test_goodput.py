"""tests/virtual/goodput.py on campaigns whose costs are known."""

import json
import math

import pytest

from tests.virtual import goodput


def campaign(seed: int, lost: int = 2, longer: int = 1) -> dict[str, object]:
    """720 steps of 0.05 s, one each 0.1 s, with 17 restarts of 10 to 50 s, 30 on average, or
    `longer` times as much; 14 lost so many steps each, 3 were preempted."""
    down = [10.0 * longer, 50.0 * longer] * 8 + [30.0 * longer]
    wall = 720 * 0.1 + 14 * lost * 0.05 + sum(down)
    told = {"steps": 720, "useful_s": 36.0, "wall_s": wall, "seconds": 560, "save_s": 0.1}
    told |= {"lost_steps": [lost] * 14 + [0] * 3, "down_s": down}
    failures = {"rank": 14, "preempted": 3}
    return {"seed": seed, "failures": failures, "restarts": 17, **told}


def test_campaigns_are_told_beside_their_prediction(tmp_path, monkeypatch, capsys):
    file = tmp_path / "seeds.jsonl"
    lines = [campaign(1), campaign(2), campaign(3, lost=9, longer=3), {"seed": 4, "wrong": "it"}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr("sys.argv", ["goodput", str(file)])
    goodput.main()
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 6 and table[-1] == "1 and 2 of 3 within the 80% interval"
    # 36 of 560 s; 720 steps with 14 x 2.5 steps and 17 x 30 s of 20 minutes beside them.
    assert table[2].split(" | ")[4] == "6.4%" and table[2].endswith(f"{720 / 755.425:.1%} |")
    # The third cost more, which is no part of its own prediction.
    low, mid, high = goodput.predicted(lines[:2], 720, False)
    assert table[4].split(" | ")[3] == f"{mid:.1%} ({low:.1%} to {high:.1%})"


def test_a_failure_loses_half_an_interval_and_what_is_being_written():
    _, mid, _ = goodput.predicted([campaign(1), campaign(2)], 720, True)
    # 1 step + 0.1 s of 0.1 s each where nothing was announced, and a restart, every 42 steps.
    assert mid == pytest.approx(1 / (1 + 0.85 * (1 + 1) / 42 + 30 / 1200 / 42), rel=0.01)


def test_in_the_hosts_seconds_a_restart_and_what_lies_between_steps_cost_too():
    _, mid, _ = goodput.predicted([campaign(1, lost=20), campaign(2, lost=20)], 72_000, False)
    # Every 0.2 s two steps of 0.05 s are saved, which takes 0.1 s more; an end every 4.2 s, of
    # which 15% save first.
    lost = 2 * 0.05 / (math.expm1(0.2 / 4.2) * math.exp(0.1 / 4.2))
    saved = 0.85 * lost + 0.15 * 4.2 * math.exp(-0.1 / 4.2) / 2
    assert mid == pytest.approx(saved / (4.2 + 30), rel=0.02)
