"""gpu-check on a CPU: the driver, its limits, its results and its table."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu_check import __main__ as driver
from benchmarks.gpu_check.items import GATES, ITEMS, STEPS, TRAININGS, Item, chosen
from benchmarks.gpu_check.pack import PRESENT, runtime_pins
from benchmarks.gpu_check.results import FILE, LIMIT, read, record
from benchmarks.gpu_check.table import render
from benchmarks.gpu_check.train import steps, watched

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/benchmarks/gpu.md"


def check(output: Path, *items: str, timeout_s: float) -> tuple[list[dict], str]:
    """Results and table of a dry run."""
    line = [sys.executable, "-m", "benchmarks.gpu_check", *items, "--device", "cpu"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "GPU_CHECK_WORK": str(output / "work")}
    done = subprocess.run(
        [*line, "--output", str(output)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return list(read(output / "results.jsonl")), (output / "table.md").read_text()


def test_some_items_dry(tmp_path):
    """A training and a model's steps: records, table, and nothing else measured."""
    results, table = check(tmp_path, "train.125m-zero2", "steps.125m-dense-ours", timeout_s=280)
    log = (tmp_path / "log.txt").read_text()
    ends = {r["item"]: r["code"] for r in results if r["kind"] == "item"}
    names = ("data", "train.125m-zero2", "steps.125m-dense-ours")
    assert ends == dict.fromkeys(names, 0), log
    (training,) = (r for r in results if r["kind"] == "train")
    assert training["steps"] >= 6 and training["last_loss"] < training["first_loss"]
    assert {"step_s", "forward_s", "tokens_per_s"} <= training.keys()
    batches = [r["micro_batch"] for r in results if r["kind"] == "step"]
    assert batches == [1, 2, 4]
    assert table.startswith("Dry run on a CPU: every model is tiny")
    (row,) = (line for line in table.splitlines() if line.startswith("| 125m-zero2 "))
    assert f"{training['tokens_per_s']:,.0f}" in row


@pytest.mark.slow
@pytest.mark.timeout(7300)
def test_every_item_dry(tmp_path):
    results, table = check(tmp_path, timeout_s=7200)
    log = (tmp_path / "log.txt").read_text()
    ends = {r["item"]: r["code"] for r in results if r["kind"] == "item"}
    assert ends == {item.name: 0 for item in ITEMS}, log
    assert {r["name"] for r in results if r["kind"] == "train"} == {t.name for t in TRAININGS}
    assert {r["name"] for r in results if r["kind"] == "step"} == {s.name for s in STEPS}
    assert "skipped" not in log.rsplit("===== tests", 1)[1].split("=====")[0]
    assert "not whole" not in table


def test_an_item_ends_at_its_limit_with_all_its_processes(tmp_path, monkeypatch):
    monkeypatch.setenv(FILE, str(tmp_path / "results.jsonl"))
    monkeypatch.setenv("DEVICE", "cpu")
    driver.run(Item("probe", 1), 1.0, tmp_path / "log.txt")
    # A quick machine has answered some of its questions by then.
    (end,) = (r for r in read(tmp_path / "results.jsonl") if r["kind"] == "item")
    assert end["code"] == "limit" and end["s"] < 30
    assert "===== probe, at most 1 s" in (tmp_path / "log.txt").read_text()


def test_a_training_that_says_more_than_a_pipe_holds_is_watched(tmp_path, monkeypatch):
    """Nobody may have to read before it goes on; it is killed at its step."""
    monkeypatch.setenv(LIMIT, str(time.time() + 60))
    code = (
        "import sys, time\n"
        "print('o' * 200_000, flush=True), print('e' * 200_000, file=sys.stderr)\n"
        "open('metrics.jsonl', 'w').write('{\"step\": 1, \"loss\": 5.0}\\n')\n"
        "time.sleep(300)"
    )
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, **both)
    out, err = watched(process, tmp_path, 1)
    assert (len(out), len(err), process.returncode) == (200_001, 200_001, -9)
    assert len(steps(tmp_path)) == 1


def test_an_item_that_fails_is_recorded_and_shown(tmp_path, monkeypatch):
    monkeypatch.setenv(FILE, str(tmp_path / "results.jsonl"))
    monkeypatch.setenv("DEVICE", "cpu")
    monkeypatch.setenv("NANOGPT", "")
    driver.run(Item("steps.of no model", 1), 60.0, tmp_path / "log.txt")
    results = list(read(tmp_path / "results.jsonl"))
    assert results[0]["code"] == 1
    assert "| steps.of no model | exit code 1 | " in render(results)


def test_items_have_one_name_and_are_chosen_in_order():
    names = [item.name for item in ITEMS]
    assert len(set(names)) == len(names)
    assert [i.name for i in chosen(["exact", "probe"])] == ["data", "probe", "exact"]
    assert [i.name for i in chosen(["train.1.3b"])] == ["data", "train.1.3b"]
    assert chosen([]) == list(ITEMS)
    with pytest.raises(SystemExit, match=r"no item speed; there are data, exact, probe"):
        chosen(["speed"])


def test_the_first_call_holds_what_tells_most():
    """By limits, which are twice the reckoning, one call of 540 s gets to the model steps."""
    spent, held = 0, []
    for item in ITEMS:
        spent += item.limit_s
        held += [item.group] * (spent <= 540)
    assert set(held) >= {"data", "probe", "train", "exact", "tests", "steps"}


def test_a_line_cut_off_by_the_end_of_a_call_is_passed_over(tmp_path, monkeypatch):
    path = tmp_path / "results.jsonl"
    monkeypatch.setenv(FILE, str(path))
    record("probe", question="q", answer=[1.5, 2])
    path.write_text(path.read_text() + '{"kind": "probe", "quest')
    assert list(read(path)) == [{"kind": "probe", "question": "q", "answer": [1.5, 2]}]


def test_a_table_of_measured_values():
    step = {"kind": "step", "name": "125m-dense-ours", "tokens_per_s": 500e3, "peak_bytes": 20e9}
    results = [
        {"kind": "call", "commit": "abc", "card": "NVIDIA H200", "versions": {}, "time": "now"},
        {"kind": "probe", "question": "how fast", "answer": {"64": 1.5}},
        step | {"micro_batch": 16, "step_s": 0.065, "mfu": 0.41},
        step | {"micro_batch": 32, "step_s": 0.120, "mfu": 0.44, "tokens_per_s": 540e3},
        {"kind": "step", "name": "125m-dense-ours", "micro_batch": 64, "error": "out of memory"},
        {
            "kind": "exact",
            "mode": "fast",
            "gate": GATES[0],
            "steps": 30,
            "first_different_step": 7,
            "largest_loss_difference": 2.5e-4,
            "weights_equal": False,
        },
        {
            "kind": "train",
            "name": "350m",
            "computing": {
                "attention": {"dense": "sdpa cudnn", "banded": "flex"},
                "loss": "triton",
                "compile": "blocks",
                "slow": ["something"],
            },
        },
        {"kind": "item", "item": "tests", "code": "limit", "s": 110.0},
        {"kind": "item", "item": "train.350m", "code": None, "s": 0.0},
    ]
    table = render(json.loads(json.dumps(results)))
    assert table.startswith("| measured |")
    assert "| now | abc | NVIDIA H200 |  |" in table
    assert '| how fast | `{"64": 1.5}` |' in table
    (row,) = (line for line in table.splitlines() if line.startswith("| 125m | dense | ours |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[5:] == ["41.0%", "65.0", "20.0", "32", "32", "44.0%", "540,000", "20.0"]
    assert (
        "| dense sdpa cudnn, banded flex, loss triton, compile blocks, slow: something |" in table
    )
    assert "|  | differs from step 7, loss by up to 2.5e-04 |" in table
    assert "| tests | ended at its limit | 110 |" in table
    assert "| train.350m | not started: no time left | 0 |" in table


def test_the_documented_table_is_empty_or_measured():
    """The page's columns are the driver's; predictions stand in it until a GPU fills the rest."""
    page = PAGE.read_text(encoding="utf-8")
    for line in render([]).splitlines():
        if line.startswith(("| gate", "| model step", "| training", "| measured")):
            assert line in page


def test_what_travels_is_what_training_needs():
    names = {r.name for r in runtime_pins()}
    assert {"torch", "deepspeed", "orjson"} <= names and "pytest" not in names
    assert "deepspeed" not in PRESENT and "torch" in PRESENT
    assert all(str(r.specifier).startswith("==") for r in runtime_pins())
