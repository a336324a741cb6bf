"""The dashboard: what it follows, what it draws, what it warns about."""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from megagpt import cli
from megagpt.errors import UsageError
from megagpt.log.metrics import cut, encode
from megagpt.report import watch
from megagpt.report.dashboard import alerts, binned, finished, frame, seconds_left
from megagpt.report.series import Run, read_facts, read_run
from megagpt.report.watch import Follower
from tests.report.test_report import make_run

ROOT = Path(__file__).resolve().parents[2]


def steps(n: int, **changes) -> list[dict]:
    step = {"batch_tokens": 1000, "tokens_per_s": 2000.0, "step_s": 0.5, "loss": 3.0} | changes
    return [
        step | {"step": i, "tokens": i * 1000, "time": 1000.0 + i / 2, "grad_norm": 1.0}
        for i in range(1, n + 1)
    ]


def seen(folder: Path, lines: list[dict], total_tokens: int = 1_000_000) -> Run:
    (folder / "config.toml").write_text(
        'model = "gpt3-125m"\noutput = "x"\n[data]\ntrain = [{ path = "d" }]\n'
        f"[schedule]\ntotal_tokens = {total_tokens}\nbatch_tokens = 2048\n"
        "ramp_start_tokens = 2048\nramp_tokens = 0\nwarmup_tokens = 0\ndecay_tokens = 0\n"
        "[checkpoint]\nevery_tokens = 50_000\n"
    )
    found = read_facts(folder, lines)
    assert found.config is not None
    return found


def test_follows_a_file_that_grows_and_is_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    follower = Follower(path)
    with pytest.raises(UsageError, match=r"metrics\.jsonl: not found"):
        follower.read()
    lines = [encode(step) for step in steps(6)]
    path.write_bytes(b"".join(lines[:3]) + lines[3][:20])
    assert [line["step"] for line in follower.read()] == [1, 2, 3]
    with path.open("ab") as file:
        file.write(lines[3][20:] + b"not json\n" + lines[4])
    assert [line["step"] for line in follower.read()] == [1, 2, 3, 4, 5]
    cut(path, 2)
    with path.open("ab") as file:
        file.write(lines[2])
    assert [line["step"] for line in follower.read()] == [1, 2, 3]


def drawn(folder: Path, losses: list[float]) -> list[str]:
    """The lines of a frame's curve of the loss, behind its axis."""
    lines = [step | {"loss": loss} for step, loss in zip(steps(len(losses)), losses, strict=True)]
    console = Console(width=60, record=True, file=open(os.devnull, "w"))
    console.print(frame(read_facts(folder, lines), 1e9, 60))
    text = console.export_text().split("tokens/s")[0]
    return re.findall(r"^\u2502 [^\u2502\u2524]*[\u2502\u2524](.*) \u2502$", text, re.MULTILINE)


def test_a_curve_falls_from_its_largest_to_its_smallest_value(tmp_path):
    curve = drawn(tmp_path, [5.0 - 0.01 * step for step in range(400)])
    columns = [min(line.find(c) for c in line if ord(c) > 0x2800) for line in curve]
    # One straight line from the top left to the bottom right, without a step in between.
    assert columns[0] == 0 and columns == sorted(columns)
    assert ord(curve[-1].rstrip()[-1]) > 0x2800 and len(curve[-1].rstrip()) >= 46


@settings(max_examples=30, deadline=None)
@given(losses=st.lists(st.floats(-1e30, 1e30) | st.just(math.nan), min_size=1, max_size=150))
def test_any_losses_can_be_drawn(tmp_path_factory, losses):
    folder = tmp_path_factory.mktemp("run")
    curve = drawn(folder, losses)
    dots = [c for line in curve for c in line if 0x2800 < ord(c) < 0x2900]
    assert bool(dots) == any(map(math.isfinite, losses))


def test_bins_by_hand():
    assert binned(np.array([1.0, 3, 5, 7]), 2).tolist() == [2, 6]
    assert binned(np.array([1.0, 3]), 4).tolist() == [1, 3]
    assert binned(np.array([1, math.nan, math.inf, 5]), 2).tolist() == [1, 5]
    assert np.isnan(binned(np.array([math.nan, math.nan, 5, 5]), 2)).tolist() == [True, False]


def test_a_sound_run_has_no_alerts(tmp_path):
    assert alerts(seen(tmp_path, steps(90)), now=1050.0) == []


@pytest.mark.parametrize(
    ("lines", "now", "message"),
    [
        (steps(90), 1400.0, "no step for 5 min 55 s; a step takes 0.5 s"),
        (
            [
                *steps(90),
                {"event": "spike", "step": 90, "tokens": 90_000, "reason": "loss 9 is 12"},
            ],
            1050.0,
            "spike at step 90: loss 9 is 12",
        ),
        (steps(89) + steps(90, loss=math.nan)[-1:], 1050.0, "spike at step 90: loss nan"),
        (
            steps(88, skipped_steps=1) + steps(90, skipped_steps=3)[-2:],
            1050.0,
            "2 of the last 90 steps were skipped",
        ),
        (
            steps(90) + steps(120, tokens_per_s=1000.0)[-30:],
            1060.0,
            "throughput is 50% below usual at this batch size",
        ),
        (steps(120), 1060.0, "no checkpoint for 120k tokens"),
    ],
)
def test_alerts(tmp_path, lines, now, message):
    found = alerts(seen(tmp_path, lines), now)
    assert message in found


def test_a_complete_run_is_not_quiet(tmp_path):
    run = seen(tmp_path, steps(90), total_tokens=90_000)
    assert finished(run) and alerts(run, now=1e9) == []


def test_time_left(tmp_path):
    # 910k tokens at 1000 tokens in 0.5 s; the run's own last step ends past the total.
    run = seen(tmp_path, steps(90))
    assert seconds_left(run) == pytest.approx(455, rel=0.01)


def test_a_frame_shows_the_run(tmp_path):
    run = read_run(make_run(tmp_path / "run", restart=True))
    console = Console(width=100, record=True, file=open(os.devnull, "w"))
    console.print(frame(run, time.time(), 100))
    text = console.export_text()
    assert "restarts 1" in text and "60k of 300B tokens" in text and "step 60" in text
    assert all(len(line) == 100 for line in text.splitlines())


def test_a_frame_of_a_run_that_tells_little(tmp_path):
    run = read_facts(tmp_path, [{"step": 1, "tokens": 10, "loss": 3.0}])
    console = Console(width=60, record=True, file=open(os.devnull, "w"))
    console.print(frame(run, time.time(), 60))
    assert "10 tokens" in console.export_text()


def parse(*words: object) -> argparse.Namespace:
    return cli.parser("watch").parse_args(["watch", *map(str, words)])


def test_once_prints_one_frame(tmp_path, capsys):
    args = parse(make_run(tmp_path / "run"), "--once")
    args.run(args)
    assert "60k of 300B tokens" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"--every -1\.0: must be greater than 0 seconds"):
        watch.run(parse(tmp_path, "--every", "-1"))


def test_a_run_before_its_first_step(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_bytes(encode({"event": "start", "step": 0, "tokens": 0}))
    watch.run(parse(tmp_path, "--once"))
    assert "waiting for the first step" in " ".join(capsys.readouterr().out.split())


LIVE = """
import sys
from megagpt.cli import parser
args = parser("watch").parse_args(["watch", sys.argv[1], "--every", "0.1"])
sys.exit(args.run(args))
"""


def test_live_on_a_terminal_until_the_run_is_complete(tmp_path):
    import pty

    lines = steps(90)
    seen(tmp_path, lines, total_tokens=90_000)
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:50]))
    main, side = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", LIVE, str(tmp_path)], stdout=side, cwd=ROOT,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "40"},
    ) as process:  # fmt: skip
        os.close(side)
        shown, written = b"", False
        while True:
            try:
                shown += os.read(main, 65_536)
            except OSError:  # the other side has ended
                break
            if not written and b"50k of 90k" in shown:
                written = True
                with path.open("a") as file:
                    file.write("".join(json.dumps(line) + "\n" for line in lines[50:]))
    assert process.returncode == 0 and written
    assert b"90k of 90k tokens" in shown and b"complete" in shown
