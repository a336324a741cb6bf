"""A run folder belongs to one process; the system gives it back when that process dies."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megagpt.errors import UsageError
from megagpt.files import lock
from tests.lib.distributed import ROOT

HOLD = "import sys,time;from pathlib import Path;from megagpt.files import lock;"
HOLD += "lock(Path(sys.argv[1]));print('held',flush=True);time.sleep(60)"


def holder(folder: Path) -> subprocess.Popen[str]:
    line = [sys.executable, "-c", HOLD, str(folder)]
    made = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert made.stdout is not None and made.stdout.readline() == "held\n"
    return made


def test_a_second_training_is_refused_and_names_the_first(tmp_path):
    other = holder(tmp_path)
    try:
        with pytest.raises(UsageError, match=f"is being trained by process {other.pid} on "):
            lock(tmp_path, wait_s=0.3)
    finally:
        other.kill()
        other.wait()
    # kill -9 leaves nothing behind that would have to be removed.
    lock(tmp_path, wait_s=0)
    assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_run_that_is_still_saving_is_waited_for(tmp_path, caplog):
    other = holder(tmp_path)
    command = ["sh", "-c", f"sleep 1; kill -{signal.SIGKILL} {other.pid}"]
    with subprocess.Popen(command):
        lock(tmp_path, wait_s=20)
    other.wait()
    assert f"waiting for process {other.pid} on" in caplog.text


def test_the_same_process_may_come_back(tmp_path):
    lock(tmp_path, wait_s=0)
    lock(tmp_path, wait_s=0)
