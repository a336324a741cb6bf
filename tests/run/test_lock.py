"""A run folder belongs to one process; a start outwaits an earlier one that ends, and no other."""

import logging
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from megagpt.cluster.stop import StopRequest
from megagpt.errors import MegagptError, Stopped, UsageError
from megagpt.files import ENDS, Lock
from tests.lib.distributed import ROOT, environment

HOLD_STILL = "import sys,time;from pathlib import Path;from megagpt.files import Lock;"
HOLD_STILL += "lock=Lock(Path(sys.argv[1]));print('held',flush=True);time.sleep(60)"


def holder(folder: Path) -> subprocess.Popen[str]:
    line = [sys.executable, "-c", HOLD_STILL, str(folder)]
    made = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert made.stdout is not None and made.stdout.readline() == "held\n"
    return made


def test_a_second_training_is_refused_and_names_the_first(tmp_path):
    other = holder(tmp_path)
    try:
        with pytest.raises(UsageError, match=f"is being trained by process {other.pid} on "):
            Lock(tmp_path, wait_s=0.3)
    finally:
        other.kill()
        other.wait()
    # kill -9 leaves nothing behind that would have to be removed.
    Lock(tmp_path, wait_s=0)
    assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_run_that_is_still_saving_is_waited_for(tmp_path, caplog):
    other = holder(tmp_path)
    command = ["sh", "-c", f"sleep 1; kill -{signal.SIGKILL} {other.pid}"]
    with subprocess.Popen(command):
        Lock(tmp_path, wait_s=20)
    other.wait()
    assert f"waiting for process {other.pid} on" in caplog.text


def test_the_same_process_may_come_back(tmp_path):
    Lock(tmp_path, wait_s=0)
    Lock(tmp_path, wait_s=0)


# --- holders that end by themselves ---

HOLD = """
import sys, time
from pathlib import Path
from megagpt import files
lock = files.Lock(Path(sys.argv[1]))
seconds, every = float(sys.argv[2]), float(sys.argv[3])
lock.ends_within(5.0)
print("holds", flush=True)
until = time.monotonic() + seconds
while time.monotonic() < until:
    time.sleep(0.2)
    if every:
        lock._told = float("-inf")
        lock.ends_within(100 + time.monotonic() % 50)
"""


@pytest.fixture
def held(tmp_path):
    """Starts a process that keeps the folder for some seconds, and may say that it gets on."""
    started = []

    def hold(seconds: float, gets_on: bool = False) -> subprocess.Popen[str]:
        line = [sys.executable, "-c", HOLD, str(tmp_path), str(seconds), str(int(gets_on))]
        process = subprocess.Popen(line, env=environment(), stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "holds\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.communicate()


def test_a_holder_that_is_cut_off_is_outwaited(held, tmp_path, caplog):
    """It holds longer than a start waits for one that says nothing, and ends by itself."""
    process, signs = held(3), []
    with caplog.at_level(logging.WARNING):
        Lock(tmp_path, wait_s=0.5, alive=lambda: signs.append(1))
    assert process.wait(timeout=30) == 0 and signs
    assert f"waiting for process {process.pid} on " in caplog.text
    assert "which still trains there, 0 minutes at most" in caplog.text


def test_a_start_that_waits_ends_when_it_is_asked_to(held, tmp_path):
    held(60)
    with StopRequest() as stop, pytest.raises(Stopped) as ended:
        os.kill(os.getpid(), signal.SIGINT)
        Lock(tmp_path, alive=partial(stop.waits, lambda: None))
    assert str(ended.value) == "stopped by SIGINT before it began; run the same command again"


def test_a_holder_that_gets_on_is_named(held, tmp_path):
    process = held(60, gets_on=True)
    with pytest.raises(UsageError, match=f"is being trained by process {process.pid} on "):
        Lock(tmp_path, wait_s=0.5)


def test_a_holder_that_should_have_ended_is_named(held, tmp_path):
    process = held(60)
    with pytest.raises(MegagptError, match=f"still kept by process {process.pid} on .* should hav"):
        Lock(tmp_path, wait_s=0.5)


def test_a_holder_of_an_earlier_version_is_waited_for_as_ever(held, tmp_path):
    process = held(60)
    (tmp_path / ".lock").write_text("process 7 on host-a")
    with pytest.raises(UsageError, match="is being trained by process 7 on host-a; stop it first"):
        Lock(tmp_path, wait_s=0.5)
    # Not once the holder had ended, but before.
    assert process.poll() is None


def test_a_lock_tells_when_its_process_ends(tmp_path):
    lock = Lock(tmp_path)
    lock.ends_within(60)
    lock.ends_within(99)  # a moment later
    text = (tmp_path / ".lock").read_text()
    assert abs(float(text.partition(ENDS)[2]) - time.time() - 60) < 30
