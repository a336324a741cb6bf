"""What a person sees while a run goes on: lines, a bar, the time left."""

import logging
import math
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.log.console import figures, fitting
from megagpt.log.eta import Eta
from megagpt.log.units import amount, duration
from tests.lib.recorded import ROOT, open_log, record


def test_plain_lines(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    log = open_log(tmp_path, console="plain", every_steps=5)
    for step in range(1, 101):
        log.step(record(step) | {"mfu": 0.412, "step_s": 0.5})
    log.evaluation(
        {"step": 100, "tokens": 100_000, "validation_loss": 2.0}
        | {"validation_losses": {"web": 1.5, "books": 2.5}}
    )
    log.event("checkpoint", name="step-100")
    log.close()
    lines = [entry.getMessage() for entry in caplog.records]
    assert len([line for line in lines if "tok/s" in line]) == 21  # 1, 5, 10 ... 100
    assert lines[0].endswith("start")
    assert lines[1] == (
        "step 1  tokens 1k/100k (1.0%)  loss 5.0000  lr 1.00e-03  batch 1k  grad 0.5  2k tok/s"
        "  mfu 41.2%  eta 50 s"
    )
    assert "validation loss 2.0000  (web 1.5000  books 2.5000)" in lines[-2]
    assert lines[-1] == "step 100  checkpoint  name step-100"


def test_console_must_be_known(tmp_path):
    with pytest.raises(ValueError, match="console = 'loud': must be one of auto, bar, plain, off"):
        open_log(tmp_path, console="loud")


BAR = """
import logging, sys, time
from pathlib import Path
from tests.lib.recorded import open_log, record
logging.basicConfig(level=logging.INFO, format="%(message)s")
log = open_log(Path(sys.argv[1]), console="auto")
for step in range(1, 101):
    log.step(record(step))
    if step == 49:
        time.sleep(0.5)
    if step == 50:
        logging.info("a message in between")
        time.sleep(0.5)
log.close()
logging.info("after the bar")
"""


def test_a_bar_on_a_terminal(tmp_path):
    import pty

    main, side = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", BAR, str(tmp_path)],
        stderr=side,
        cwd=ROOT,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "140"},
    ) as process:
        os.close(side)
        shown = b""
        while True:
            try:
                shown += os.read(main, 65_536)
            except OSError:  # the other side has ended
                break
    assert process.returncode == 0
    text = shown.decode()
    assert "50k/100k tokens" in text and "100k/100k tokens" in text
    assert "loss 0.0500" in text and "eta 0 s" in text
    assert "a message in between" in text and "after the bar" in text


def test_the_figures_that_tell_most_fit_first():
    texts = figures(record(2) | {"mfu": 0.4, "skipped_steps": 1})
    assert fitting(texts, 200) == (
        "loss 2.5000  lr 1.00e-03  batch 1k  grad 0.5  2k tok/s  mfu 40.0%  skipped 1"
    )
    assert fitting(texts, 36) == "loss 2.5000  2k tok/s  skipped 1"
    assert fitting(texts, 5) == ""


def test_eta_counts_the_ramp():
    # step time = 1 s + 1 ms a token; batches of 1000 below 50k tokens, of 4000 after.
    eta = Eta(100_000, lambda tokens: 1000 if tokens < 50_000 else 4000)
    for size in (1000, 1000, 2000, 2000):
        eta.observe(size, 1.0 + size / 1000)
    # 30 steps of 1000 and 12.5 of 4000 are left, and 80k tokens.
    assert eta.seconds(20_000) == pytest.approx(30 + 12.5 + 80, rel=0.01)
    assert eta.seconds(100_000) == 0.0


def test_eta_before_the_first_step_and_at_one_size():
    eta = Eta(1000)
    assert eta.seconds(0) is None
    eta.observe(100, 2.0)
    assert eta.seconds(500) == pytest.approx(10.0)
    # Larger batches were no slower: all of the step is a fixed time.
    eta.observe(200, 2.0)
    assert eta.seconds(500) == pytest.approx(5.0)


@given(
    st.lists(st.tuples(st.integers(1, 10**6), st.floats(1e-3, 1e3)), min_size=1, max_size=30),
    st.integers(0, 10**9),
)
def test_eta_is_never_negative(observed, tokens):
    eta = Eta(10**9, lambda done: 1000 + done // 1000)
    for size, step_s in observed:
        eta.observe(size, step_s)
    left = eta.seconds(tokens)
    assert left is not None and left >= 0 and math.isfinite(left)


def test_amounts_and_durations():
    assert [amount(n) for n in (0, 512, 999.7, 1000, 32_768, 1_250_000, 3e11, 999_990)] == [
        "0", "512", "1k", "1k", "32.8k", "1.25M", "300B", "1M",
    ]  # fmt: skip
    assert [duration(s) for s in (0.2, 59.6, 125, 3600, 90_000, None)] == [
        "0 s", "1 min", "2 min 5 s", "1 h", "1 d 1 h", "?",
    ]  # fmt: skip
