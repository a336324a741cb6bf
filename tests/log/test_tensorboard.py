"""TensorBoard itself, open before, during and after a crash (slow: it takes seconds to reload)."""

import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lib.recorded import open_log, record, run_until_killed, steps

pytestmark = pytest.mark.slow


@pytest.fixture
def server(tmp_path) -> Iterator[str]:
    """The address of a TensorBoard on tmp_path / tensorboard."""
    (tmp_path / "tensorboard").mkdir()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path / "tensorboard")]
    with subprocess.Popen(
        [*command, "--port", "0", "--reload_interval", "1"], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r"at (http://\S+)", line):
                yield found[1]
                break
        process.terminate()


def shown(server: str, tag: str, until: Callable[[list[int]], bool]) -> list[int]:
    """Steps of a curve as the server tells them, once `until` holds of them."""
    address = f"{server}data/plugin/scalars/scalars?run=.&tag={tag}"
    found: list[int] = []
    for _ in range(60):
        try:
            with urllib.request.urlopen(address) as answer:
                found = [int(point[1]) for point in json.load(answer)]
        except OSError:
            pass  # the tag is not there yet
        if until(found):
            return found
        time.sleep(1)
    raise AssertionError(f"{tag} stayed at {found[-5:]}")


def test_the_curve_on_the_page_has_no_step_twice(tmp_path, server):
    run_until_killed(tmp_path, 0, 40)
    before = shown(server, "train/loss", lambda found: found[-1:] >= [40_000])
    log = open_log(tmp_path, 20)
    for step in range(21, 31):
        log.step(record(step))
    after = shown(server, "train/loss", lambda found: found[-1:] == [30_000])
    log.close()
    assert before[:40] == after[:30] + list(range(31_000, 41_000, 1000))
    assert after == [line["tokens"] for line in steps(Path(tmp_path))]


def test_the_page_has_the_first_screen_and_the_texts(tmp_path, server):
    log = open_log(tmp_path)
    log.step(record(1))
    shown(server, "train/loss", lambda found: found == [1000])
    log.close()
    with urllib.request.urlopen(f"{server}data/plugin/custom_scalars/layout") as answer:
        titles = [category["title"] for category in json.load(answer)["category"]]
    assert titles[0] == "Is it learning?"
    with urllib.request.urlopen(f"{server}data/plugin/text/text?run=.&tag=run/environment") as page:
        assert "python" in page.read().decode()
