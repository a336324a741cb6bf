"""A run that nobody looks at ends by itself; tests/virtual/ten_days.py has the whole ten days."""

import pytest

from tests.virtual.ten_days import BAD_TIMES, Unattended, made

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]


@pytest.mark.parametrize("days", [0.6, pytest.param(3.0, marks=pytest.mark.slow)])
def test_days_unattended(cluster, slurm, spare, tmp_path, days):
    told = Unattended(cluster, slurm, made(tmp_path, days), seed=1).live(days)
    assert sum(told["failures"].values()) > 2 and told["restarts"] > 2, told
    assert told["failures"]["bad"] <= BAD_TIMES
    assert slurm.queue() == ""
