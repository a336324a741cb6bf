"""The learning curve of tasks: every checkpoint of a real run, its lines, its chart."""

import json
import re
from pathlib import Path

import pytest

from megagpt.checkpoint import list_checkpoints
from megagpt.cli import main
from megagpt.report.charts import charts
from megagpt.report.series import read_run
from megagpt.use.learned import read_tasks
from tests.lib.corpus import run_file
from tests.lib.distributed import group_of_one
from tests.lib.here import train_here

SCHEDULE = {"total_tokens": 1536, "warmup_tokens": 512, "batch_tokens": 512, "ramp_tokens": 0}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps, each with a checkpoint, and two questions."""
    root = tmp_path_factory.mktemp("curve")
    file = run_file(
        root,
        schedule=SCHEDULE | {"ramp_start_tokens": 512},
        checkpoint={"every_tokens": 512, "keep_last": 3},
        evaluate={"every_tokens": 1536, "batches": 1},
        log={"tensorboard": False},
    )
    with group_of_one():
        train_here(file)
    rows = [{"context": "the model", "choices": ["reads", "x"], "gold": n} for n in (0, 1)]
    (root / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def test_every_checkpoint_is_a_point_of_the_curve(root, capsys):
    run = root / "run"
    steps = [int(path.name.removeprefix("step_")) for path in list_checkpoints(run)]
    assert len(steps) == 3
    words = ["evaluate", str(run), "--all-checkpoints", "--json"]
    words += ["--task", f"choice={root / 'own.jsonl'}"]
    assert main(words) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["step"] for one in told] == steps
    lines = read_tasks(run)
    assert [line["step"] for line in lines] == steps
    for line, one in zip(lines, told, strict=True):
        figure = one["tasks"][0]["figures"]["acc"]
        assert {key: line[key] for key in ("value", "low", "high")} == figure
        assert (line["chance"], line["tokens"]) == (0.5, one["trained_tokens"])
    # Another task adds lines, the same one takes the place of its own.
    assert main([*words, "--task", "RW=" + write_words(root)]) == 0
    assert len(read_tasks(run)) == 6
    [chart] = [one for one in charts([read_run(run)]) if one["title"] == "accuracy on tasks"]
    names = [line["name"] for line in chart["lines"]]
    assert names == ["choice", "choice, a guess", "reversed_words", "reversed_words, a guess"]
    assert chart["lines"][0]["x"] == [line["tokens"] for line in lines]
    assert chart["lines"][1]["y"] == [50.0] * 3
    found = re.search(r'id="data">(.*?)</script>', (run / "report.html").read_text())
    assert found and chart in json.loads(found[1])["charts"]


def write_words(root: Path) -> str:
    path = root / "words.txt"
    path.write_text("letters\nreading\n")
    return str(path)


def test_lines_that_are_none_are_left_out(root):
    before = read_tasks(root / "run")
    path = root / "run" / "tasks.jsonl"
    path.write_bytes(path.read_bytes() + b'nonsense\n{"step": 1, "tokens": 1, "task": 3}\n{"step"')
    assert read_tasks(root / "run") == before
    assert charts([read_run(root / "run")])


def test_what_has_no_curve(root, capsys, tmp_path):
    words = ["--task", "2D+", "--all-checkpoints"]
    assert main(["evaluate", str(tmp_path), *words]) == 2
    assert "no checkpoint here; --all-checkpoints wants a run folder" in capsys.readouterr().err
    assert main(["evaluate", str(root / "run"), *words, "--checkpoint", "1"]) == 2
    assert "--all-checkpoints and --checkpoint: give one of them" in capsys.readouterr().err
