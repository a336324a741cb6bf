"""A profile of real operations."""

import gzip
import json

import pytest
import torch

from megagpt.errors import UsageError
from megagpt.log.profile import Profile


def work() -> None:
    x = torch.ones(200, 200)
    for _ in range(20):
        x = torch.mm(x, x).clamp(max=1.0)


def test_profiles_the_steps_that_were_asked_for(tmp_path):
    profile = Profile(tmp_path, first_step=2, last_step=3)
    tables = []
    for step in range(1, 5):
        profile.begin(step)
        work()
        tables.append(profile.end(step))
    assert [table is not None for table in tables] == [False, False, True, False]
    lines = str(tables[2]).splitlines()
    assert len(lines) <= 11
    products = next(line for line in lines if line.startswith("aten::mm "))
    assert products.split()[-1] == "40"  # two steps of twenty
    assert (tmp_path / "profile" / "steps_2_3_rank_0.txt").read_text() == tables[2]
    with gzip.open(profile.trace) as file:
        events = json.load(file)["traceEvents"]
    assert sum(event.get("name") == "aten::mm" for event in events) == 40


def test_a_run_that_resumes_inside_the_range_profiles_the_rest(tmp_path):
    profile = Profile(tmp_path, first_step=2, last_step=5)
    profile.begin(5)
    work()
    assert "aten::mm" in str(profile.end(5))


@pytest.mark.parametrize(("first", "last"), [(0, 3), (5, 4)])
def test_a_range_that_is_none(tmp_path, first, last):
    with pytest.raises(UsageError, match=rf"log\.profile_steps = \[{first}, {last}\]: must be two"):
        Profile(tmp_path, first_step=first, last_step=last)
