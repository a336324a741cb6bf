"""How long ranks wait for each other: what the run file says, else ten minutes at most."""

import pytest

from megagpt.cluster.process import meeting_minutes
from megagpt.cluster.ranks import Ranks
from megagpt.cluster.watchdog import Watchdog
from megagpt.config import load_run
from tests.lib.corpus import run_file


@pytest.mark.parametrize(
    ("watchdog", "meeting", "minutes"),
    [(30.0, 0.0, 10.0), (0.5, 0.0, 0.5), (0.0, 0.0, 10.0), (0.5, 45.0, 45.0)],
)
def test_minutes_of_the_meeting(tmp_path, watchdog, meeting, minutes):
    words = [f"log.watchdog_minutes={watchdog}", f"log.meeting_minutes={meeting}"]
    assert meeting_minutes(load_run(run_file(tmp_path), words)) == minutes


def test_the_watchdog_leaves_the_ranks_their_time_to_meet(tmp_path):
    with Watchdog(tmp_path, Ranks(), minutes=1.0, meeting_minutes=45.0) as watchdog:
        phase, _, limit_s = watchdog._phase
        assert (phase, limit_s) == ("start", 4 * 60 + 3 * 45 * 60)
        watchdog.begin("start")
        assert watchdog._phase[2] == 4 * 60
