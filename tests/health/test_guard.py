"""The guards' judgements on hand-made series; tests/health/test_guard_run.py has the processes."""

import math
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

from megagpt.cluster.stop import StopRequest, TimeLimit, time_limit
from megagpt.cluster.watchdog import launchers, orphaned, parent_of
from megagpt.config import CheckpointConfig, parse_run
from megagpt.errors import UsageError
from megagpt.health.replicas import CHUNK, checksum, digest, outliers
from megagpt.health.spikes import SpikeDetector, z_score
from tests.lib.distributed import environment

# --- time limits --------------------------------------------------------------------------------


def test_the_earlier_limit_counts():
    slurm = {"SLURM_JOB_END_TIME": "1600"}
    assert time_limit(0, {}, 1000.0) is None
    assert time_limit(0, {"SLURM_JOB_END_TIME": "soon"}, 1000.0) is None
    assert time_limit(5, slurm, 1000.0).end == 1300
    both = time_limit(20, slurm, 1000.0)
    assert (both.end, both.name) == (1600, "SLURM_JOB_END_TIME")


def test_the_margin_is_twice_the_longest_step_and_save():
    limit = TimeLimit(end=10_000.0, name="x", start=0.0)
    # Before anything is known: 120 s for a save and 10 s to leave.
    assert limit.margin_s(0.0) == 130
    assert not limit.reached(100.0, 0.0)
    assert not limit.reached(130.0, 40.0)
    assert not limit.reached(140.0, 40.0)
    assert limit.margin_s(40.0) == 2 * 30 + 2 * 40 + 10


def test_stops_within_the_limit():
    limit = TimeLimit(end=1_000.0, name="x", start=0.0)
    now = 0.0
    while not limit.reached(now, 25.0):
        now += 7.0
    # Another step and a save still fit.
    assert 1_000 - 2 * 7 - 2 * 25 - 10 <= now <= 1_000 - 7 - 25 - 10


def test_a_short_limit_is_not_all_margin():
    assert TimeLimit(end=60.0, name="x", start=0.0).margin_s(0.0) == 6


def test_stops_after_steps():
    stop = StopRequest(CheckpointConfig(stop_after_steps=3), {})
    assert [stop.look() for _ in range(4)] == [False, False, True, True]
    assert stop.reason == "checkpoint.stop_after_steps"
    assert not any(StopRequest().look() for _ in range(3))


def test_stops_at_slurms_end():
    stop = StopRequest(CheckpointConfig(), {"SLURM_JOB_END_TIME": str(int(time.time()) + 1)})
    time.sleep(1)
    assert stop.look() and stop.reason == "the time limit (SLURM_JOB_END_TIME)"


def test_the_end_of_a_job_that_is_over_is_no_limit():
    # A shell, or a tmux, that was started in it.
    over = {"SLURM_JOB_END_TIME": "999"}
    assert time_limit(0, over, 1000.0) is None
    assert time_limit(5, over, 1000.0).end == 1300
    stop = StopRequest(CheckpointConfig(), {"SLURM_JOB_END_TIME": str(int(time.time()) - 9)})
    assert not stop.look() and stop.reason == ""


LISTEN = """
import os, signal, sys
from megagpt.cluster.stop import StopRequest
with StopRequest() as stop:
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    print(stop.look(), stop.reason)
"""


@pytest.mark.parametrize("name", "SIGTERM SIGINT SIGHUP SIGUSR1 SIGUSR2 SIGXCPU".split())
def test_signals_before_the_end_of_a_job_or_a_connection(name):
    line = [sys.executable, "-c", LISTEN, name]
    # Where the tests run under nohup, children would ignore SIGHUP.
    default = partial(signal.signal, getattr(signal, name), signal.SIG_DFL)
    done = subprocess.run(
        line, env=environment(), capture_output=True, text=True, preexec_fn=default
    )
    assert done.stdout == f"True {name}\n", (done.returncode, done.stderr)


def test_a_run_under_nohup_outlives_its_terminal():
    line = ["nohup", sys.executable, "-c", LISTEN, "SIGHUP"]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True)
    assert done.stdout == "False \n", (done.returncode, done.stderr)


# --- spikes -------------------------------------------------------------------------------------


def test_z_score_by_hand():
    # Median 3, distances 2 1 0 1 2: MAD 1.
    assert z_score(3 + 1.4826 * 5, [1, 2, 3, 4, 5], 1e-9) == pytest.approx(5)
    # A spike among the values moves neither median nor MAD much.
    assert z_score(3 + 1.4826 * 5, [1, 2, 3, 4, 5000], 1e-9) == pytest.approx(5)
    assert z_score(1.01, [1.0] * 9, 0.001) == pytest.approx(10)


def series(n: int, seed: int = 1) -> list[tuple[float, float]]:
    """Losses that fall as a training's do, with noise, and norms that vary by factors."""
    draw = random.Random(seed)
    return [
        (3 + 3 * math.exp(-i / 300) + draw.gauss(0, 0.03), math.exp(draw.gauss(-0.5, 0.25)))
        for i in range(n)
    ]


def test_a_falling_noisy_loss_is_no_spike():
    for seed in range(5):
        detector = SpikeDetector(window=128, threshold=8.0)
        assert not any(detector.add(*pair) for pair in series(2000, seed))
        assert len(detector.history) == 128


@pytest.mark.parametrize(
    ("pair", "word"), [((4.0, 0.5), "loss 4.0000"), ((3.1, 20.0), "gradient norm 20")]
)
def test_spikes_are_told(pair, word):
    detector = SpikeDetector(window=128, threshold=8.0)
    for normal in series(1500):
        detector.add(*normal)
    assert detector.add(*pair).startswith(word)
    # The spike does not hide the next one, and does not make what is normal look odd.
    assert detector.add(*pair).startswith(word)
    assert detector.add(3.0, 0.6) == ""


def test_the_first_steps_are_never_spikes():
    detector = SpikeDetector(window=128, threshold=8.0)
    assert not any(detector.add(*pair) for pair in [*[(3.0, 1.0)] * 15, (30.0, 1.0)])
    assert detector.add(30.0, 1.0)


def test_the_judgement_depends_on_the_pairs_alone():
    whole, later = SpikeDetector(64, 8.0), SpikeDetector(64, 8.0)
    pairs = [*series(300), (5.0, 1.0), *series(100, 2), (3.0, 50.0)]
    told = [whole.add(*pair) for pair in pairs[:200]]
    later.history = list(whole.history)
    assert [whole.add(*pair) for pair in pairs[200:]] == [later.add(*p) for p in pairs[200:]]
    assert not any(told)


def test_steps_that_were_not_applied_are_counted_and_not_compared():
    detector = SpikeDetector(8, 8.0)
    detector.add(3.0, 1.0)
    nothing = [detector.add(math.nan, math.inf, False), detector.add(3.0, math.nan, False)]
    assert nothing == ["", ""]
    assert detector.history == [(3.0, 1.0)]
    assert detector.give_up(3) == ""
    assert detector.give_up(2).startswith("2 steps in a row left the weights as they were, because")
    detector.add(3.0, 1.0)
    assert detector.skipped == 0


def test_a_judgement_before_the_update_is_the_one_after_it():
    detector = SpikeDetector(64, 8.0)
    for pair in [*series(300), (5.0, 1.0), (math.nan, 1.0), (3.0, 50.0), *series(20, 2)]:
        before, pairs = detector.verdict(*pair), list(detector.history)
        assert detector.history == pairs
        assert detector.add(*pair, applied=not before) == before


def test_a_level_that_has_come_to_stay_is_no_spike_for_ever():
    detector = SpikeDetector(16, 8.0)
    for _ in range(16):
        detector.add(3.0, 1.0)
    told = [bool(detector.add(4.0, 1.0, applied=False)) for _ in range(16)]
    # From the median of seven new among nine old values on to that of nine new ones.
    assert told == [True] * 8 + [False] * 8
    assert detector.give_up(16) and not detector.give_up(17)


# --- replicas -----------------------------------------------------------------------------------


@pytest.mark.parametrize("digest", [digest, checksum])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_bit_of_any_element_changes_the_digest(dtype, digest):
    torch.manual_seed(1)
    weight = torch.randn(3, 50).to(dtype)
    bits = weight.view(-1).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])
    before = int(digest(weight))
    for place in range(0, 150, 7):
        for bit in range(8 * dtype.itemsize - 1):
            bits[place] ^= 1 << bit
            assert int(digest(weight)) != before
            bits[place] ^= 1 << bit
    assert int(digest(weight)) == before


@pytest.mark.parametrize("digest", [digest, checksum])
def test_exchanged_elements_change_the_digest(digest):
    weight = torch.arange(2 * CHUNK + 3, dtype=torch.float32)
    before = int(digest(weight))
    assert int(digest(weight.clone())) == before
    weight[[1, CHUNK + 5]] = weight[[CHUNK + 5, 1]]
    assert int(digest(weight)) != before


def test_the_odd_one_out():
    assert outliers([7, 7, 7]) == []
    assert outliers([7, 8, 7, 7]) == [1]
    assert outliers([8, 7, 7]) == [0]
    assert outliers([7, 8]) == [1]


# --- processes ----------------------------------------------------------------------------------


def test_the_chain_of_launchers():
    assert launchers("python") == {}
    assert launchers("torchrun") == {os.getpid(): os.getppid()}
    # This is no deepspeed command, so what is above the parent may go.
    assert launchers("deepspeed") == {os.getpid(): os.getppid()}
    assert not orphaned(launchers("torchrun"))
    assert orphaned({os.getpid(): 999_999_999})
    assert parent_of(999_999_999) is None


HANG = """
import sys, threading, time
from pathlib import Path
from megagpt.cluster.ranks import Ranks
from megagpt.cluster import watchdog
watchdog.GRACE_S = 0.2
def stuck():
    threading.Event().wait()
with watchdog.Watchdog(Path(sys.argv[1]), Ranks(rank=3), 0.01) as dog:
    dog.begin("step")
    dog.begin("step")
    stuck()
"""


def test_a_hang_leaves_its_stacks_and_ends(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", HANG, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    stacks = (tmp_path / "stacks" / "rank_00003.txt").read_text()
    assert "rank 3: no end of this step within 0.01 minutes" in stacks
    assert "in stuck" in stacks
    assert f"its stacks: {tmp_path}/stacks/rank_00003.txt; ending" in done.stderr


def test_a_hang_that_holds_pythons_lock_ends_too(tmp_path):
    # A C call through PyDLL keeps the lock, as a hung extension may.
    hang = HANG.replace("threading.Event().wait()", "import ctypes; ctypes.PyDLL(None).sleep(60)")
    done = subprocess.run(
        [sys.executable, "-c", hang, str(tmp_path)], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 1
    assert "Timeout" in done.stderr and "in stuck" in done.stderr


ORPHAN = """
import os, signal, sys, time
from pathlib import Path
from megagpt.cluster import watchdog
from megagpt.cluster.ranks import Ranks
watchdog.LOOK_S, watchdog.ORPHAN_S, watchdog.LONG_S = 0.05, 0.5, 30
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
with watchdog.Watchdog(Path(sys.argv[1]), Ranks(), 1) as dog:
    dog.begin("step")
    for step_s in (1.0, 0.1):
        dog.begin("step")
        time.sleep(step_s)
    dog.begin(sys.argv[2])
    dog.launchers = {os.getpid(): 999_999_999}
    time.sleep(float(sys.argv[3]))
    dog.begin("saving")
    time.sleep(1)
print("saved", len(asked))
"""


@pytest.mark.parametrize(
    ("phase", "seconds", "said"),
    [
        # An evaluation goes on to its end, and so does a step as long as those before it.
        ("evaluation", 2.0, "saved 1\n"),
        ("step", 1.4, "saved 1\n"),
        ("step", 30.0, ""),
    ],
)
def test_without_a_launcher_what_is_under_way_may_end(tmp_path, phase, seconds, said):
    line = [sys.executable, "-c", ORPHAN, str(tmp_path), phase, str(seconds)]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == (said, 0 if said else 1), done.stderr
    assert "rank 0: the launcher is gone; saving and ending" in done.stderr
    assert said or "rank 0: no end of this step in 2." in done.stderr


# --- configuration ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("checkpoint.stop_after_minutes=-1", r"minutes = -1: must be 0 or more \(.*limit\)"),
        ("checkpoint.stop_after_steps=-1", r"stop_after_steps = -1: must be 0 or more \(.*limit\)"),
        ("log.watchdog_minutes=nan", r"watchdog_minutes = nan: must be a finite number \("),
        ("log.check_replicas_every_steps=-2", r"_steps = -2: must be 0 or more \(.*0: only before"),
        ("optimizer.spike_window=0", "spike_window = 0: must be 1 or more"),
        ("optimizer.spike_threshold=0", "spike_threshold = 0: must be above 0"),
        ("optimizer.spike_action='no'", "spike_action = 'no': must be one of none, skip, rollback"),
    ],
)
def test_values_that_cannot_be(override, message):
    text = 'model = "gpt3-125m"\noutput = "x"\n[data]\ntrain = [{ path = "x" }]\n'
    with pytest.raises(UsageError, match=message):
        parse_run(text, [override])
