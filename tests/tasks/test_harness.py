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
from megagpt.config.presets import ModelConfig
from megagpt.errors import UsageError
from megagpt.hub.exporting import export_model
from megagpt.tasks.examples import Task
from megagpt.tasks.scoring import TaskOptions, score_task
from megagpt.tasks.sets import task_of
from megagpt.use.apart import evaluate_apart
from megagpt.use.likelihood import Scorer
from megagpt.use.loading import load_placed
from megagpt.use.options import TextOptions
from tests.lib.corpus import sentences, write_corpus
from tests.lib.distributed import environment
from tests.lib.weights import weights_folder

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")  # of the harness's own class for transformers
N_CTX = 48
TASKS = ("local_words", "local_choice", "local_text", "local_answer")
FILES = {
    "words": "output_type: loglikelihood\ndoc_to_text: '{{context}}'\n"
    "doc_to_target: '{{completion}}'\ntarget_delimiter: ''\n",
    "choice": "output_type: multiple_choice\ndoc_to_text: '{{context}}'\n"
    "doc_to_choice: '{{choices}}'\ndoc_to_target: '{{gold}}'\n",
    "text": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n",
    "answer": "output_type: generate_until\ndoc_to_text: '{{context}}'\n"
    "doc_to_target: '{{completion}}'\ngeneration_kwargs: {until: [' '], max_gen_toks: 1}\n",
}
METRICS = {
    "words": ("acc", "perplexity"),
    "choice": ("acc", "acc_norm", "acc_bytes"),
    "text": ("word_perplexity", "byte_perplexity", "bits_per_byte"),
    "answer": ("exact_match",),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, their export, and four tasks of files that lie here."""
    root = tmp_path_factory.mktemp("harness")
    config = ModelConfig(n_layer=2, n_head=2, d_model=32, n_ctx=N_CTX, vocab_size=257)
    # Of this seed, the likeliest next byte depends on the context, and often is a letter.
    weights_folder(root / "model", config, "bytes", seed=6)
    export_model(root / "model", root / "export")
    texts = sentences(40, 1)
    rows = [
        {
            "context": context,
            # Every other answer is what the model says.
            "completion": letter if n % 2 else "q",
            "choices": [texts[4 * n + 2][:18], texts[4 * n + 3][:40].strip(), f"\u00e9{n}"],
            "gold": n % 3,
            "text": " ".join(texts[4 * n : 4 * n + 2 + n % 3]),
        }
        for n, (context, letter) in enumerate(said(root / "model")[:10])
    ]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, lines in FILES.items():
        metrics = "".join(f"  - metric: {metric}\n" for metric in METRICS[name])
        (root / "tasks").mkdir(exist_ok=True)
        (root / "tasks" / f"{name}.yaml").write_text(
            f"task: local_{name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
            f"    validation: {root / 'rows.jsonl'}\nvalidation_split: validation\n"
            f"test_split: null\n{lines}metric_list:\n{metrics}metadata: {{version: 1.0}}\n"
        )
    return root


def said(model: Path) -> list[tuple[str, str]]:
    """Contexts, and the letter that the model says after each."""
    scorer = Scorer(*load_placed(model, "fp32", "cpu")[:2], 8)
    contexts = [f"\n{text[:30].strip()} {n} =" for n, text in enumerate(sentences(40, 1))]
    one = [TextOptions(temperature=0.0, max_tokens=1)] * len(contexts)
    letters = scorer.texts([scorer.encode(c) for c in contexts], one, lambda n, text: False)
    found = zip(contexts, letters, strict=True)
    return [(context, letter) for context, letter in found if letter.isalpha() and letter.isascii()]


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


def figures(results: dict[str, Any]) -> dict[str, float]:
    """Every figure that is no standard error and no text; of a perplexity its logarithm, which is
    what rounds: at 33 nats an error of 1e-8 in them is one of 3e-7 in the perplexity."""
    return {
        f"{task} {name}": math.log(value) if "perplexity" in name else value
        for task in TASKS
        for name, value in results.get(task, {}).items()
        if isinstance(value, float) and "stderr" not in name
    }


@pytest.fixture(scope="module")
def theirs(folder: Path) -> dict[str, float]:
    """What the harness says of the exported model by its own class for transformers."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder / "export"), "dtype": "float32"},
        tasks=list(TASKS),
        device="cpu",
        batch_size=2,
        task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
        bootstrap_iters=0,
        log_samples=False,
    )
    return figures(found["results"])


def test_both_ways_give_the_figures_of_transformers(folder, theirs, capsys):
    expected = theirs
    assert len(expected) == 9, expected
    assert expected["local_words acc,none"] == expected["local_answer exact_match,none"] == 0.5
    words = ["--harness", ",".join(TASKS), "--include-path", str(folder / "tasks"), "--json"]
    assert main(["evaluate", str(folder / "model"), *words]) == 0
    told = json.loads(capsys.readouterr().out)
    assert figures(told["results"]) == pytest.approx(expected, rel=1e-6, abs=1e-6)
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
    results = figures(json.loads(path.read_text())["results"])
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
