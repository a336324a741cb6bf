"""EleutherAI's harness: our adapter, its own class on the exported model, and our own figures."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megagpt.cli import main
from megagpt.errors import UsageError
from megagpt.tasks.examples import Task
from megagpt.tasks.scoring import TaskOptions, score_task
from megagpt.tasks.sets import task_of
from megagpt.use.likelihood import Scorer
from megagpt.use.loading import load_placed
from megagpt.use.score import evaluate_apart
from tests.lib.corpus import write_corpus
from tests.lib.distributed import environment
from tests.lib.harness_tasks import TASKS, by_transformers, harness_figures, make_tasks

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")  # of the harness's own class for transformers
N_CTX = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, their export, and four tasks of files that lie here."""
    root = tmp_path_factory.mktemp("harness")
    make_tasks(root, N_CTX, seed=6)
    return root


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def scorer(folder: Path) -> Scorer:
    model, encoding, _ = load_placed(folder / "model", "fp32", "cpu")
    return Scorer(model, encoding, 3)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> dict[str, float]:
    """What the harness says of the exported model by its own class for transformers."""
    return by_transformers(folder)


def test_both_ways_give_the_figures_of_transformers(folder, theirs, capsys):
    expected = theirs
    assert len(expected) == 9, expected
    assert expected["local_words acc,none"] == expected["local_answer exact_match,none"] == 0.5
    words = ["--harness", ",".join(TASKS), "--include-path", str(folder / "tasks"), "--json"]
    assert main(["evaluate", str(folder / "model"), *words]) == 0
    told = json.loads(capsys.readouterr().out)
    assert harness_figures(told["results"]) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert told["n-samples"]["local_choice"]["effective"] == 10


def test_our_own_figures_are_the_harness_s(folder, theirs, scorer):
    """Of the same questions: multiple choice, forced answers, and documents apart."""
    own = task_of("choice", str(folder / "rows.jsonl"))
    found = score_task(scorer, own, TaskOptions()).figures
    for name in ("acc", "acc_norm", "acc_bytes"):
        assert found[name].value == theirs[f"local_choice {name},none"]
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    exact = task_of("exact", str(folder / "rows.jsonl"))
    assert isinstance(exact, Task)
    forced = score_task(scorer, exact, TaskOptions()).figures
    assert forced["acc"].value == theirs["local_words acc,none"]
    assert math.log(forced["perplexity"].value) == pytest.approx(
        theirs["local_words perplexity,none"], rel=1e-6
    )
    corpus = write_corpus(folder / "corpus", [row["text"] for row in rows])
    apart = evaluate_apart(scorer, corpus)
    assert apart.bits_per_byte.value == pytest.approx(
        theirs["local_text bits_per_byte,none"], rel=1e-6
    )
    assert apart.documents == apart.left_out == 10
    assert apart.bytes == apart.tokens == sum(len(row["text"]) for row in rows)


@pytest.mark.slow
def test_the_harness_s_own_command_line(folder, theirs):
    line = [sys.executable, "-m", "megagpt.tasks.harness", "run", "--model", "megagpt"]
    line += ["--model_args", f"folder={folder / 'model'}", "--device", "cpu", "--batch_size", "4"]
    line += ["--tasks", "local_words", "--include_path", str(folder / "tasks")]
    line += ["--output_path", str(folder / "out")]
    done = subprocess.run(
        line, env=environment() | dict(os.environ), capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    [path] = (folder / "out").rglob("results*.json")
    results = harness_figures(json.loads(path.read_text())["results"])
    assert len(results) == 2
    for name, value in results.items():
        assert value == pytest.approx(theirs[name], rel=1e-6)


def test_what_the_harness_is_not_told(folder, scorer, capsys):
    from lm_eval.api.instance import Instance

    from megagpt.tasks.harness import HarnessModel

    with pytest.raises(UsageError, match=r"--model megagpt: takes folder=RUN_DIR.*found nonsense"):
        HarnessModel(folder="x", nonsense=1)
    with pytest.raises(UsageError, match="a batch size that is a number"):
        HarnessModel(folder="x", batch_size="auto")
    words = ["--harness", "no_such_task", "--include-path", str(folder / "tasks")]
    assert main(["evaluate", str(folder / "model"), *words]) == 2
    assert "--harness no_such_task: no task of lm_eval 0.4.13" in capsys.readouterr().err
    asked = ("a", {"until": [" "], "max_gen_toks": N_CTX})
    long = Instance(request_type="generate_until", doc={}, arguments=asked, idx=0)
    with pytest.raises(UsageError, match=f"max_gen_toks {N_CTX}: must be 1 to {N_CTX - 1}"):
        HarnessModel(scorer=scorer).generate_until([long])
