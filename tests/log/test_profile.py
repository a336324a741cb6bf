"""A profile of real operations."""

import gzip
import json

import pytest
import torch

from megagpt.config import parse_run
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


def test_a_profile_that_the_run_does_not_live_to_the_end_of(tmp_path):
    profile = Profile(tmp_path, first_step=2, last_step=5)
    assert profile.close() is None
    profile.begin(2)
    work()
    assert profile.end(2) is None
    assert "aten::mm" in str(profile.close()) and profile.trace.exists()
    assert profile.close() is None


@pytest.mark.parametrize("steps", [[0, 3], [5, 4], [3], [1, 2, 3]])
def test_a_range_that_is_none(steps):
    text = 'model = "gpt3-125m"\noutput = "x"\n[data]\ntrain = [{ path = "x" }]\n'
    with pytest.raises(UsageError) as refusal:
        parse_run(text, [f"log.profile_steps={steps}"])
    assert f"log.profile_steps = {steps}: must be two steps, the first" in str(refusal.value)
