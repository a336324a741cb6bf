"""One number of one rank's weights or moments goes wrong: see tests/lib/wild.py."""

import random
from pathlib import Path

import pytest

from tests.lib.wild import drawn, ordered, table

NEVER_TRAINING = [
    ("fp32", "nan", 0),
    ("fp32", "exponent", 30),
    ("exp_avg", "inf", 0),
    ("exp_avg_sq", "sign", 0),
]
"""What no training makes of a number: a weight's highest bit of the exponent, the sign of v, ..."""


def faults(count: int) -> list[dict]:
    draw = random.Random(5)
    chosen = [NEVER_TRAINING[i % len(NEVER_TRAINING)] for i in range(count)]
    return [drawn(draw) | {"key": k, "kind": kind, "bit": bit} for k, kind, bit in chosen]


def test_faults_on_one_rank_of_two_are_found_and_nothing_is_lost(tmp_path: Path):
    # On either rank, in the middle.
    planned = [fault | {"step": 5 + i, "rank": i % 2} for i, fault in enumerate(faults(4))]
    found = ordered(tmp_path, "zero1", planned)
    assert table(found)["total"] == {"tried": 4, "found": 4}, found


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("layout", ["zero1", "zero3", "pp2", "tp2"])
def test_a_campaign_of_faults(tmp_path: Path, layout: str):
    draw = random.Random(layout)
    found = table(ordered(tmp_path, layout, [drawn(draw) for _ in range(60)]))
    rows = found["rows"]
    print(found)
    assert not found["total"].get("lost")
    for name, row in rows.items():
        if name.startswith(("nan", "inf")) or name == "sign exp_avg_sq":
            assert row == {"tried": row["tried"], "found": row["tried"]}, (name, row)
    # What cannot be told from training does what training could.
    assert found["largest change of the last loss by what was believed"] < 0.05
