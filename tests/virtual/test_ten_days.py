"""A run that nobody looks at ends by itself; tests/virtual/ten_days.py has the whole ten days."""

import pytest

from tests.virtual.ten_days import BAD_TIMES, Unattended, made

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1200)]


def test_three_days_unattended(cluster, slurm, spare, tmp_path):
    days = 3.0
    told = Unattended(cluster, slurm, made(tmp_path, days), seed=1).live(days)
    assert sum(told["failures"].values()) > 2 and told["restarts"] > 2, told
    assert told["failures"]["bad"] <= BAD_TIMES
    assert slurm.queue() == ""
