"""`megagpt init`: the run file that it writes is the run that it fitted, and fits the corpus."""

import argparse
import dataclasses
import itertools
import re

import numpy as np
import psutil
import pytest

from megagpt.check.machine import Gpu
from megagpt.cli import main
from megagpt.config import load_run
from megagpt.config.flops import flops_per_token, parameters
from megagpt.config.presets import PRESETS
from megagpt.corpus.manifest import read_manifest
from megagpt.corpus.records import prepare
from megagpt.errors import UsageError
from megagpt.order.loader import training_loader
from megagpt.plan.candidates import Cluster
from megagpt.plan.layout import idle_share, layout_of
from megagpt.plan.sanity import MOST_EPOCHS
from megagpt.start.command import machine_of
from megagpt.start.fit import CORE_FLOPS, SIZES, SMALL_EPOCHS, Wish, fit, round_down
from megagpt.start.launcher import check
from megagpt.start.run_text import run_text
from megagpt.tokenizer.palette import Palette
from tests.lib.corpus import edit_manifest, sentences, write_corpus


@pytest.fixture
def corpora(tmp_path, monkeypatch):
    """data/mine and its validation split below the working directory; no GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    write_corpus(tmp_path / "data/mine", sentences(2000, 1))
    write_corpus(tmp_path / "data/mine-validation", sentences(200, 2))
    return tmp_path


def large(folder, tokens):
    """A manifest that claims so many tokens: what is fitted to it reads nothing else."""
    manifest = read_manifest(folder)
    [shard, *_] = manifest.shards
    bytes_ = tokens * manifest.dtype.itemsize
    shard = dataclasses.replace(shard, tokens=tokens, bytes=bytes_)
    return dataclasses.replace(manifest, shards=(shard,), vocab_size=50257)


def test_init_writes_a_run_file_of_twelve_to_twenty_lines(corpora, capsys):
    assert main(["init"]) == 0
    told, text = capsys.readouterr().out, (corpora / "mine.toml").read_text()
    assert told.endswith("next: megagpt train mine.toml\n")
    assert 12 <= len([line for line in text.splitlines() if line]) <= 20
    config = load_run("mine.toml")
    train, held_out = read_manifest("data/mine"), read_manifest("data/mine-validation")
    assert config.data.train[0].path == "data/mine"
    assert config.data.validation[0].path == "data/mine-validation"
    assert config.model.vocab_size == train.vocab_size and config.parallel.dtype == "fp32"
    assert config.schedule.total_tokens <= SMALL_EPOCHS * train.tokens
    assert config.model.n_ctx * 8 <= held_out.tokens
    # It is there now, and stays.
    assert main(["init", "mine"]) == 2
    assert "mine.toml: is there already; give another NAME" in capsys.readouterr().err


@pytest.mark.parametrize("size", [*SIZES, "gpt2-124m", "gpt3-125m", "gpt3-1.3b", "gpt1", "igpt-s"])
def test_what_is_written_is_what_was_fitted(corpora, tmp_path, size):
    machines = (2, Cluster(gpu="h100", gpus=8), Cluster(gpu="a100", gpus=6))
    for tokens, machine in itertools.product((300_000, 40_000_000, 20 * 10**9), machines):
        corpus = large("data/mine", tokens)
        fitted = fit([corpus], None, machine, "runs/x", Wish(size=size))
        path = tmp_path / "x.toml"
        path.write_text(run_text(fitted, corpus, "x.toml"))
        read = load_run(path)
        assert len([line for line in path.read_text().splitlines() if line]) <= 20
        for section in ("model", "schedule", "optimizer", "data", "parallel", "output", "preset"):
            assert getattr(read, section) == getattr(fitted.config, section)
        assert read.schedule.total_tokens <= SMALL_EPOCHS * tokens
        assert 0 < read.schedule.warmup_tokens < read.schedule.total_tokens / 10
        if isinstance(machine, Cluster):
            layout = layout_of(read, machine.gpus)
            batches = [segment.batch_tokens for segment in read.schedule.segments]
            assert not any(idle_share(read, layout, batch) for batch in batches)


def test_tokens_follow_their_rules(corpora):
    corpus = large("data/mine", 10**10)
    on_cpu = fit([corpus], None, 2, "x", Wish(minutes=3)).config
    expected = 180 * 2 * CORE_FLOPS / flops_per_token(on_cpu.model)
    assert on_cpu.schedule.total_tokens == round_down(expected)
    gpus = Cluster(gpu="h100", gpus=8)
    fitted = fit([corpus], None, gpus, "x", Wish())
    # Four epochs of 10 billion tokens are 20 for each of 2 billion parameters.
    assert fitted.size == "gpt3-1.3b" and fitted.why_tokens == "20 a parameter"
    assert fitted.config.schedule.total_tokens == round_down(20 * parameters(fitted.config.model))
    little = fit([large("data/mine", 10**8)], None, gpus, "x", Wish(size="gpt2-124m"))
    assert little.config.schedule.total_tokens == MOST_EPOCHS * 10**8
    asked = fit([corpus], None, gpus, "x", Wish(size="gpt3-125m", tokens=300_000_000_000))
    paper = PRESETS["gpt3-125m"].schedule
    assert {key: getattr(asked.config.schedule, key) for key in paper} == paper
    assert round_down(1_999) == 1_900 and round_down(7) == 7 and round_down(0.2) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--size", "gpt4"], "--size gpt4: must be one of nano, mini, small, gpt3-125m"),
        (["--data", "none"], "none does not exist"),
        (["--data", "data"], "is not a prepared corpus; make one of text"),
        (["--gpu", "x"], "--gpu x: must be one of v100"),
        (["--gpus", "-1"], "--gpus -1: must be above 0"),
        (["--gpus", "1", "--gpus-per-node", "0"], "--gpus-per-node 0: must be above 0"),
        (["--minutes", "-1"], "--minutes -1: must be above 0"),
        (["--minutes", "0"], "--minutes 0: must be above 0"),
        (["--tokens", "nan"], "must be"),
        (["--tokens", "0"], "--tokens 0: must be above 0"),
        (["--gpus", "1", "--gpu", "v100", "--size", "gpt3-13b"], "nothing works on 1 v100"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(corpora, words, message, capsys):
    data = [] if "--data" in words else ["--data", "data/mine"]
    assert main(["init", "x", *data, *words]) == 2
    assert message in capsys.readouterr().err
    assert not (corpora / "x.toml").exists()


def test_a_run_for_gpus_that_are_not_here_suits_them(corpora):
    for name, dtype in (("Tesla V100-SXM2-32GB", 'dtype = "fp16"'), ("H100", "")):
        assert main(["init", name[:4], "--data", "data/mine", "--gpus", "8", "--gpu", name]) == 0
        text = (corpora / f"{name[:4]}.toml").read_text()
        assert dtype in text and ("fp16" in text) == bool(dtype)
        assert main(["plan", f"{name[:4]}.toml", "--gpus", "8", "--gpu", name]) == 0


def test_a_name_behind_the_corpora_or_in_no_folder_is_refused(corpora, capsys):
    assert main(["init", "--data", "data/mine", "x"]) == 2
    assert "--data x: no such folder; a NAME stands before --data" in capsys.readouterr().err
    assert main(["init", "runs/x", "--data", "data/mine"]) == 2
    assert "runs/x.toml: there is no folder runs; make it" in capsys.readouterr().err
    (corpora / "runs").mkdir()
    assert main(["init", "runs/x", "--data", "data/mine", "--tokens", "999.5"]) == 0
    assert "total_tokens = 1_000 " in (corpora / "runs/x.toml").read_text()


def test_a_corpus_is_found_or_asked_for(corpora, monkeypatch, capsys):
    write_corpus(corpora / "data/other", sentences(10, 3))
    assert main(["init"]) == 2
    assert "--data: name one or several of data/mine, data/other" in capsys.readouterr().err
    assert main(["init", "mine", "--minutes", "1"]) == 0
    said = capsys.readouterr().out
    assert "wrote mine.toml" in said and "about 1 minute on" in said
    assert main(["init", "--data", "data/other"]) == 2
    assert re.search(r"data/other: \d+ tokens are too few", capsys.readouterr().err)
    monkeypatch.chdir(corpora / "data")
    assert main(["init"]) == 2
    command = "tokenize_corpus.py TEXT... --output data/NAME --validation-fraction 0.1"
    assert f"{command} --validation-by-place" in capsys.readouterr().err


@pytest.mark.parametrize("path", [".", "../mine/shards/.."])
def test_a_corpus_at_the_working_folder_has_its_folders_name(corpora, monkeypatch, path):
    (corpora / "data/mine/shards").mkdir()
    monkeypatch.chdir(corpora / "data/mine")
    assert main(["init", "--data", path]) == 0
    config = load_run("mine.toml")
    assert config.output == "runs/mine"
    assert config.data.train[0].path == str(corpora / "data/mine")
    assert config.data.validation[0].path == str(corpora / "data/mine-validation")


def test_several_corpora_are_mixed_by_their_sizes(corpora, capsys):
    write_corpus(corpora / "data/other", sentences(4000, 3))
    edit_manifest(corpora / "data/other", split__name="train")
    assert main(["init", "two", "--data", "data/mine", "data/other"]) == 0
    weights = [source.weight for source in load_run("two.toml").data.train]
    sizes = [read_manifest(f"data/{name}").tokens for name in ("mine", "other")]
    assert weights == pytest.approx([size / sum(sizes) for size in sizes], abs=1e-4)


def test_records_decide_the_context(corpora, capsys):
    for name, count, length in (("r", 300, 101), ("r-validation", 9, 101), ("long", 80, 3001)):
        ids = np.arange(count * length).reshape(count, length) % 10
        prepare(corpora / name, records=ids, vocabulary=10)
    for name, n_ctx in (("r", 100), ("long", 3000)):
        assert main(["init", name, "--data", name]) == 0
        text, config = (corpora / f"{name}.toml").read_text(), load_run(f"{name}.toml")
        assert config.model.n_ctx == n_ctx and config.schedule.batch_tokens >= 4 * n_ctx
        assert "as the corpus has: ids of no text" in text
        assert training_loader(config).n_windows > 0
    assert main(["init", "both", "--data", "r", "long"]) == 2
    assert "of 101 tokens, long of 3001 tokens: records of a run" in capsys.readouterr().err


def test_images_get_an_image_gpt(corpora):
    palette = Palette(np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3))
    prepare("images", records=np.arange(64 * 300).reshape(300, 64) % 4, vocabulary=palette)
    for name, size in (("one", "nano"), ("two", "gpt3-125m"), ("three", "igpt-s")):
        assert main(["init", name, "--data", "images", "--size", size]) == 0
        config = load_run(f"{name}.toml")
        assert (config.model.family, config.model.vocab_size, config.model.n_ctx) == ("igpt", 4, 64)
        check(config, 1)


def test_the_machine_is_what_is_named_or_found(monkeypatch):
    args = argparse.Namespace(gpus=0, gpu="", gpus_per_node=8)
    cards = [Gpu(name="NVIDIA A100-SXM4-80GB", memory_mib=81920, errors=0)] * 4
    found = machine_of(args, cards)
    assert (found.gpu, found.gpus, found.per_node) == ("a100", 4, 4)
    assert found.host == psutil.virtual_memory().total / 1e9
    assert isinstance(machine_of(args, []), int)
    args = argparse.Namespace(gpus=32, gpu="h200", gpus_per_node=8)
    named = machine_of(args, [])
    assert (named.gpu, named.gpus, named.per_node, named.domain) == ("h200", 32, 8, 8)
    with pytest.raises(UsageError, match="--gpu x: must be one of"):
        machine_of(argparse.Namespace(gpus=1, gpu="x", gpus_per_node=8), [])
