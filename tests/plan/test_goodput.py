"""tests/virtual/goodput.py on campaigns whose costs are known."""

import json

import pytest

from tests.virtual import goodput


def campaign(seed: int, lost: int) -> dict[str, object]:
    """720 steps of 0.05 s with 17 restarts of 30 s each."""
    down = [30.0] * 17
    told = {"steps": 720, "useful_s": 36.0, "wall_s": 40 + sum(down), "seconds": 560, "save_s": 0.1}
    told |= {"lost_steps": [lost] * 17, "down_s": down}
    return {"seed": seed, "failures": {"rank": 17}, "restarts": 17, **told}


def test_campaigns_are_told_beside_their_prediction(tmp_path, monkeypatch, capsys):
    file = tmp_path / "seeds.jsonl"
    lines = [campaign(1, 2), campaign(2, 2), campaign(3, 9), {"seed": 4, "wrong": "it"}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr("sys.argv", ["goodput", str(file)])
    goodput.main()
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 6 and table[-1] == "3 and 2 of 3 within the 80% interval"
    # 36 of 560 s; 720 steps with 17 x 2.5 steps and 17 x 30 s of 20 minutes beside them.
    assert table[2].split(" | ")[4] == "6.4%" and table[2].endswith(f"{720 / 762.925:.1%} |")


def test_a_failure_loses_half_an_interval_and_what_is_being_written():
    others = [campaign(1, 2), campaign(2, 2)]
    _, mid, _ = goodput.predicted(others, 720, True)
    # 1 step + 0.1 s of 0.054 s each, and a restart, every 42 steps.
    assert mid == pytest.approx(1 / (1 + (1 + 1.8) / 42 + 30 / 1200 / 42), rel=0.01)
