"""The command against transformers, against its own definition, and against the run's figures."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megagpt.checkpoint import load_model
from megagpt.corpus.shards import index_bytes
from megagpt.errors import DamageError, UsageError
from megagpt.files import file_sha256
from megagpt.log import read_metrics
from megagpt.model import GPT
from megagpt.order.loader import TokenLoader
from megagpt.tokenizer import load_tokenizer
from megagpt.use.evaluate import Estimate, Result
from megagpt.use.score import ScoreOptions, evaluate, ratio
from tests.engine.test_layouts import Layout, Reshaping, name
from tests.lib.corpus import edit_manifest, sentences, write_corpus
from tests.lib.weights import random_model

N_CTX = 16
BATCH_TOLERANCE = 1e-6
"""Relative: batches of another size round the model's products otherwise."""


@pytest.fixture(scope="module")
def model() -> GPT:
    return random_model(N_CTX)


@pytest.fixture(scope="module")
def encoding():
    return load_tokenizer("bytes")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text", sentences(12, 3))


def ids_of(corpus: Path) -> torch.Tensor:
    """All tokens of a corpus."""
    data = np.concatenate([np.fromfile(p, "<u2") for p in sorted(corpus.glob("*.bin"))])
    return torch.from_numpy(data.astype(np.int64))


def values(result: Result) -> list[float]:
    """Every figure of a result."""
    estimates = (result.loss, result.perplexity, result.bits_per_byte)
    return [figure for one in estimates for figure in (one.value, one.low, one.high)]


# --- the figures --------------------------------------------------------------------------------


def test_the_loss_is_that_of_transformers(model, encoding, corpus):
    pytest.importorskip("transformers")
    from tests.model.test_oracle import pairs, theirs

    other = theirs("gpt2", (2, 2, 16, N_CTX, 257), torch.float32)
    with torch.no_grad():
        for mine, parameter, turned in pairs("gpt2", model, other):
            parameter.copy_(mine.t() if turned else mine)
    ids = ids_of(corpus)
    n = (len(ids) - 1) // N_CTX
    x = ids[: n * N_CTX].view(n, N_CTX)
    y = ids[1 : n * N_CTX + 1].view(n, N_CTX)
    with torch.no_grad():
        expected = float(other(x, labels=x, shift_labels=y).loss)
    found = evaluate(model, encoding, corpus)
    assert found.loss.value == pytest.approx(expected, rel=2e-6)
    assert found.perplexity.value == pytest.approx(math.exp(expected), rel=1e-5)
    assert (found.tokens, found.left_out) == (n * N_CTX, len(ids) - n * N_CTX)
    assert found.documents == 12


@pytest.mark.parametrize("stride", [16, 8, 4, 1])
def test_every_token_is_scored_once_with_the_context_of_its_window(model, encoding, corpus, stride):
    ids = ids_of(corpus)
    losses = []
    for place in range(1, (len(ids) - 1) // stride * stride + 1):
        end = -(-place // stride) * stride
        begin = max(0, end - N_CTX)
        logits = model.logits(ids[None, begin:place])[0, -1]
        losses.append(F.cross_entropy(logits[None], ids[place : place + 1]).item())
    found = evaluate(model, encoding, corpus, ScoreOptions(stride=stride))
    assert found.tokens == len(losses)
    assert found.loss.value == pytest.approx(sum(losses) / len(losses), rel=2e-6)


@pytest.mark.parametrize("stride", [16, 4])
def test_the_size_of_a_batch_changes_only_the_rounding(model, encoding, corpus, stride):
    expected = evaluate(model, encoding, corpus, ScoreOptions(batch_size=1, stride=stride))
    for size in (2, 7, 1000):
        found = evaluate(model, encoding, corpus, ScoreOptions(batch_size=size, stride=stride))
        assert values(found) == pytest.approx(values(expected), rel=BATCH_TOLERANCE)


def test_logits_are_held_a_few_at_a_time(model, encoding, corpus, monkeypatch):
    expected = evaluate(model, encoding, corpus)
    monkeypatch.setattr("megagpt.model.gpt.SCORED_LOGITS", 5 * 257)
    assert values(evaluate(model, encoding, corpus)) == pytest.approx(values(expected), rel=1e-6)


def test_bytes_are_those_of_the_text(tmp_path):
    text = ["na\u00efve caf\u00e9, \u4e2d\u6587 text. ", "a second one \U0001f600\n", "three"] * 4
    corpus = write_corpus(tmp_path / "text", text, "gpt2")
    encoding = load_tokenizer("gpt2")
    found = evaluate(random_model(N_CTX, 50257), encoding, corpus)
    scored = ids_of(corpus)[1 : found.tokens + 1].tolist()
    words = encoding.decode_bytes([token for token in scored if token != encoding.eot_token])
    assert found.bytes == len(words) and len(words) > found.tokens
    bits = found.loss.value * found.tokens / math.log(2)
    assert found.bits_per_byte.value == pytest.approx(bits / found.bytes)


def test_the_windows_of_a_part_are_always_the_same(model, encoding, corpus):
    part = evaluate(model, encoding, corpus, ScoreOptions(max_tokens=5 * N_CTX + 3))
    assert part.tokens == 5 * N_CTX
    loader = TokenLoader([(corpus, 1.0)], N_CTX, seed=0)
    ids = torch.from_numpy(loader.samples(0, 5))
    loader.close()
    assert part.loss.value == pytest.approx(model(ids[:, :-1], ids[:, 1:]).item(), rel=2e-6)
    everything = evaluate(model, encoding, corpus)
    assert values(evaluate(model, encoding, corpus, ScoreOptions(max_tokens=10**9))) == values(
        everything
    )


def test_progress_is_told_where_there_is_no_terminal(model, encoding, corpus, capsys, monkeypatch):
    monkeypatch.setattr("megagpt.corpus.progress.LINE_EVERY_S", 0.0)
    found = evaluate(model, encoding, corpus)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("scoring")]
    assert len(lines) == -(-found.tokens // (8 * N_CTX))
    done = f"{found.tokens:,} tokens of {found.tokens:,} (100%)"
    assert lines[-1].startswith(f"scoring {corpus}: {done}, ") and lines[-1].endswith(" left")


# --- the interval -------------------------------------------------------------------------------


def test_an_interval_by_hand():
    found = ratio(np.array([2.0, 6.0]), np.array([1, 2]))
    # Residuals -2/3 and 2/3: error sqrt(2 / 1 * 8 / 9) / 3 = 4/9.
    reach = 1.959964 * 4 / 9
    assert found.value == pytest.approx(8 / 3)
    assert [found.low, found.high] == pytest.approx([8 / 3 - reach, 8 / 3 + reach])


def test_too_few_documents_have_no_interval():
    one = ratio(np.array([3.0]), np.array([2]))
    assert one.value == 1.5 and math.isnan(one.low) and math.isnan(one.high)
    assert math.isnan(ratio(np.array([3.0, 1.0]), np.array([0, 0])).value)


def test_the_interval_holds_what_it_says():
    """Corpora of documents that differ in length and difficulty: 95 of 100 hold the true mean."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        size = rng.geometric(1 / 50, 200)
        nats = size * rng.normal(3.0, 0.5, 200) + np.sqrt(size) * rng.normal(0, 2.0, 200)
        found = ratio(nats, size)
        held += found.low <= 3.0 <= found.high
    assert 0.93 < held / 2000 < 0.965


def test_the_interval_is_that_of_a_bootstrap_over_documents(model, encoding, tmp_path):
    corpus = write_corpus(tmp_path / "text", sentences(60, 5))
    found = evaluate(model, encoding, corpus)
    ids, ends = ids_of(corpus), []
    losses = []
    for begin in range(0, found.tokens, N_CTX):
        x, y = ids[None, begin : begin + N_CTX], ids[None, begin + 1 : begin + N_CTX + 1]
        losses += model.losses(x, y).tolist()
        ends += (y[0] == encoding.eot_token).tolist()
    document = np.concatenate([[0], np.cumsum(ends)[:-1]])
    nats = np.bincount(document, losses)
    size = np.bincount(document)
    draw = np.random.default_rng(1).integers(0, len(size), (4000, len(size)))
    means = nats[draw].sum(1) / size[draw].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    assert found.loss.high - found.loss.low == pytest.approx(high - low, rel=0.1)
    assert found.loss.low == pytest.approx(low, abs=0.1 * (high - low))


# --- runs of any layout -------------------------------------------------------------------------

ALONE: Layout = (1, "zero1", 1, 1)
SPLIT: list[Layout] = [
    (2, "zero3", 1, 1),
    (2, "zero1", 1, 1),
    (2, "pipeline", 1, 2),
    (4, "pipeline", 2, 1),
]
"""ZeRO-3 and 1, tensor split, pipeline x data."""
LAYOUTS = [ALONE, SPLIT[0], *(pytest.param(one, marks=pytest.mark.slow) for one in SPLIT[1:])]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Reshaping:
    """What trains a run of a layout, see trained_as(). Its three validation sets: one is evaluated
    to the last window, one has windows left over, one has fewer than the ranks read in one pass."""
    root = tmp_path_factory.mktemp("layouts")
    made = Reshaping(root)
    sets = {"even": 8, "uneven": 21, "small": 3}
    sources = []
    for number, (label, windows) in enumerate(sets.items()):
        # Of bytes, so that n tokens are exactly n_ctx * windows + 1.
        text = " ".join(sentences(60, 10 + number))[: 32 * windows]
        write_corpus(root / label, [text[:50], text[50:-1]])
        sources.append(f'{{ path = "{root / label}", weight = {number + 1} }}')
    text = made.file.read_text()
    before = f'validation = [{{ path = "{root / "validation"}" }}]'
    assert before in text
    text = text.replace(before, f"validation = [{', '.join(sources)}]")
    made.file.write_text(text.replace("total_tokens = 12288", "total_tokens = 4096"))
    return made


def trained_as(made: Reshaping, layout: Layout) -> Path:
    """The run of this layout; trained when it is first asked for."""
    run = made.root / name(layout)
    if not run.exists():
        made.fresh([layout])
    return run


def last_validation(run: Path) -> dict:
    return [line for line in read_metrics(run) if "validation_loss" in line][-1]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
def test_the_runs_own_evaluation_is_this_one(made, layout):
    run = trained_as(made, layout)
    said = last_validation(run)
    losses = {Path(path).name: loss for path, loss in said["validation_losses"].items()}
    assert set(losses) == {"even", "uneven", "small"}
    model, encoding, facts = load_model(run)
    assert facts["step"] == said["step"]
    # Eight windows are an evaluation's batch.
    for label in ("even", "uneven"):
        found = evaluate(model, encoding, made.root / label, ScoreOptions(max_tokens=8 * 32))
        assert found.tokens == 8 * 32
        assert losses[label] == pytest.approx(found.loss.value, rel=2e-6), label
    mean = sum(weight * losses[label] for weight, label in zip((1, 2, 3), losses, strict=True)) / 6
    assert said["validation_loss"] == pytest.approx(mean)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=name)
def test_the_layout_that_trained_it_does_not_show(made, layout):
    def figures(layout: Layout) -> list[float]:
        model, encoding, _ = load_model(trained_as(made, layout))
        sets = ("even", "uneven", "small")
        return [v for one in sets for v in values(evaluate(model, encoding, made.root / one))]

    def own(layout: Layout) -> list[float]:
        return list(last_validation(trained_as(made, layout))["validation_losses"].values())

    # Training itself rounds otherwise under another layout.
    assert figures(layout) == pytest.approx(figures(ALONE), rel=1e-5, nan_ok=True)
    assert own(layout) == pytest.approx(own(ALONE), rel=1e-5)


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "--batch-size 0: must be 1 window or more"),
        ({"stride": 5}, "--stride 5: must divide the model's context of 16 tokens"),
        ({"stride": -4}, "--stride -4: must divide"),
        ({"stride": 32}, "--stride 32: must divide"),
        ({"max_tokens": 15}, "--max-tokens 15: must be at least the 16 tokens that one window"),
        ({"max_tokens": -1}, "--max-tokens -1: must be at least"),
    ],
)
def test_options_that_make_no_sense(model, encoding, corpus, options, message):
    with pytest.raises(UsageError, match=message):
        evaluate(model, encoding, corpus, ScoreOptions(**options))


def test_another_tokenizer_is_refused(model, encoding, tmp_path):
    corpus = write_corpus(tmp_path / "gpt2", sentences(60, 3), "gpt2")
    with pytest.raises(
        UsageError,
        match=r"gpt2: its tokenizer 'gpt2' \(50257 tokens\) is not the model's 'bytes' \(257 "
        r"tokens\); prepare the corpus with the model's tokenizer",
    ):
        evaluate(model, encoding, corpus)


def test_a_vocabulary_of_the_same_size_is_not_enough(model, encoding, corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "text")
    edit_manifest(tmp_path / "text", tokenizer__fingerprint="0" * 64)
    with pytest.raises(UsageError, match="is not the model's"):
        evaluate(model, encoding, tmp_path / "text")
    # An import that does not know its tokenizer is taken by its size.
    edit_manifest(tmp_path / "text", tokenizer__fingerprint="")
    assert evaluate(model, encoding, tmp_path / "text").documents == 12


def test_no_data_and_too_little(model, encoding, tmp_path):
    with pytest.raises(UsageError, match="absent does not exist; prepare a corpus there"):
        evaluate(model, encoding, tmp_path / "absent")
    corpus = write_corpus(tmp_path / "short", ["few words"])
    with pytest.raises(UsageError, match=r"10 tokens do not fill one window of n_ctx \+ 1 = 17"):
        evaluate(model, encoding, corpus, ScoreOptions(stride=4))


def test_a_damaged_corpus_is_named_before_it_is_scored(model, encoding, corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "text")
    path = next((tmp_path / "text").glob("*.bin"))
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamageError, match=rf"{path.name}: .*damaged; prepare or copy the corpus"):
        evaluate(model, encoding, tmp_path / "text")


def test_an_index_of_other_documents_is_refused(model, encoding, corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "text")
    [path] = (tmp_path / "text").glob("*.idx")
    path.write_bytes(index_bytes(np.array([7, 8]), np.dtype("<u2")))
    edit_manifest(tmp_path / "text", shards__0__index_sha256=file_sha256(path))
    with pytest.raises(DamageError, match="its index tells of 15 tokens in documents, its shards"):
        evaluate(model, encoding, tmp_path / "text")


def test_an_estimate_is_carried_over():
    assert Estimate(1.0, 0.0, 2.0).mapped(lambda x: 10 * x) == Estimate(10.0, 0.0, 20.0)
