"""A classifier trains under ZeRO 0 to 3 as plain torch does, and starts from a language model."""

from pathlib import Path

import numpy as np
import pytest
import torch

from megagpt.checkpoint.export import open_weights
from megagpt.cluster.ranks import Ranks
from megagpt.config import load_run
from megagpt.corpus.forms import Forms
from megagpt.corpus.records import Masked, prepare
from megagpt.errors import UsageError
from megagpt.hub.exporting import export_model
from megagpt.model import GPT, initial_value
from megagpt.order.fitting import check_vocabulary
from megagpt.order.loader import TokenLoader
from megagpt.use.score import evaluate
from tests.engine.test_masked import compare, plain_losses, run_layouts
from tests.lib.corpus import run_file
from tests.lib.distributed import group_of_one
from tests.lib.here import train_here
from tests.lib.reshape import train
from tests.lib.weights import weights_folder

FORMS = Forms(tokens=60, length=16)
N_CTX = 32
MODEL = {
    "family": "gpt1",
    "vocab_size": FORMS.vocabulary,
    "n_ctx": N_CTX,
    "classes": 3,
    "parts": 2,
    "attention": ["dense"],
}
RUN = {
    "schedule": {
        "total_tokens": 24 * N_CTX,
        "warmup_tokens": 6 * N_CTX,
        "peak_lr": 1e-3,
        "batch_tokens": 6 * N_CTX,
        "ramp_start_tokens": 6 * N_CTX,
        "ramp_tokens": 0,
    },
    "checkpoint": {"every_tokens": 0},
    "evaluate": {"every_tokens": 12 * N_CTX, "batches": 1},
    "log": {"tensorboard": False},
}


def pairs(count: int, seed: int) -> list[Masked]:
    """Two texts of unlike lengths each, of one of three classes."""
    draw = np.random.default_rng(seed)
    texts = [draw.integers(0, 60, draw.integers(1, 9)).tolist() for _ in range(2 * count)]
    labels = draw.integers(0, 3, count).tolist()
    return [FORMS.similarity(*texts[2 * i : 2 * i + 2], labels[i]) for i in range(count)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A run file over a corpus of pairs."""
    for seed, split in enumerate(("train", "validation")):
        prepare(
            tmp_path / split,
            records=pairs(40, seed),
            vocabulary=FORMS.vocabulary,
            split=split,
        )
    return run_file(tmp_path, model=MODEL, **RUN)


def own_loss(model: GPT, loader: TokenLoader, first: int, count: int) -> torch.Tensor:
    """The model's own loss of some samples in one pass."""
    [samples] = loader.micro_batches(first, count, 0, 1, count)
    loss: torch.Tensor = model(*samples)
    return loss


def test_every_stage_trains_as_plain_torch(file):
    expected = plain_losses(load_run(file), own_loss)
    with group_of_one():
        for stage, micro in ((0, 2), (3, 3)):
            run = file.parent / f"alone-{stage}"
            layout = [f"parallel.ds_config=zero{stage}", f"parallel.micro_batch={micro}"]
            train(file, Ranks(), "", str(run), *layout)
            compare(run, expected)
    stages = [((2, f"zero{stage}", 1, 1), 1 + stage % 2) for stage in range(4)]
    for run in run_layouts(file, stages):
        compare(run, expected)


def test_a_classifier_starts_from_a_language_model(file, caplog):
    root = file.parent
    language = {"vocab_size": 60, "n_ctx": 40, "classes": 0, "parts": 1}
    words = [f"model.{key}={value}" for key, value in language.items()]
    words += [f"schedule.{key}=0" for key in ("warmup_tokens", "ramp_tokens", "ramp_start_tokens")]
    words += ["schedule.batch_tokens=40", "schedule.total_tokens=40", "evaluate.every_tokens=0"]
    values = weights_folder(root / "language", load_run(file, words).model)
    caplog.set_level("INFO")
    still = f"output={root / 'still'}"
    with group_of_one():
        train_here(file, f"init_from={root / 'language'}", "schedule.peak_lr=1e-30", still)
    for told in ("first 16 of 40 positions", "head of 3 classes begins", "3 rows of the embedding"):
        assert told in caplog.text
    found, config = open_weights(root / "still"), load_run(file)
    for name, value in values.items():
        rows = len(value) if name != "wpe.weight" else 16
        torch.testing.assert_close(found.read(name)[:rows], value[:rows], rtol=1e-6, atol=0)
    for name in ("classifier.weight", "classifier.bias"):
        drawn = initial_value(name, found.read(name).shape, config.model, config.seed)
        torch.testing.assert_close(found.read(name), drawn, rtol=1e-6, atol=1e-20)
    for override, problem in (
        ("model.classes=4", "model.classes: 3 -> 4"),
        ("model.parts=1", "model.parts: 2 -> 1"),
    ):
        other = f"output={root / 'other'}"
        with group_of_one(), pytest.raises(UsageError, match=problem):
            train_here(file, f"init_from={root / 'still'}", override, other)
    with pytest.raises(UsageError, match="model.classes = 3: no class of transformers has"):
        export_model(root / "still", root / "out")
    with pytest.raises(UsageError, match="model.classes = 3: a classifier has no loss of tokens"):
        evaluate(found.model(), None, root / "validation")


def test_corpora_and_layouts_that_do_not_suit_a_classifier_are_refused(file):
    from megagpt.plan.layout import Layout, layout_problems

    config = load_run(file, ["model.family=gpt2"])
    [problem] = layout_problems(config, Layout(world=2, pipeline=2))
    assert problem.startswith("model.classes = 3: pipeline and tensor parallel carry no classifier")
    root = file.parent
    one = [Masked([1, 2, 3] * 20, [1, 1, 1] * 20)] * 3
    prepare(root / "texts", documents=one, vocabulary="bytes")
    texts = load_run(file, ["model.vocab_size=257"])
    loader = TokenLoader([(root / "texts", 1.0)], N_CTX, 0)
    with pytest.raises(UsageError, match="is of documents, but model.classes = 3 needs records"):
        check_vocabulary(texts, [loader])
    with group_of_one(), pytest.raises(UsageError, match="none of the classes 0 to 1 of"):
        train_here(file, "model.classes=2")
