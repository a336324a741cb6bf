"""Weights & Biases, offline: the real package where it is installed, its absence elsewhere."""

import importlib.util
import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megagpt.config import load_run
from megagpt.errors import UsageError
from megagpt.run.folder import make_run_folder
from megagpt.use.pictures import png
from tests.lib.corpus import run_file
from tests.lib.recorded import curve, open_log, record

INSTALLED = importlib.util.find_spec("wandb") is not None


def test_without_the_package_the_run_ends_before_it_begins(tmp_path, monkeypatch):
    # As on a machine without it: Python's own way to say that a module is not there.
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = load_run(run_file(tmp_path), ["log.wandb=gpt"])
    with pytest.raises(UsageError, match='log.wandb = "gpt": the package wandb is not installed'):
        make_run_folder(config)
    assert not (tmp_path / "run").exists()


def messages(path: Path) -> Iterator[bytes]:
    """The records of an offline file: LevelDB's log format behind a header of 7 bytes."""
    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32_768 - at % 32_768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole record, or its last part
            yield parts
            parts = b""


def points(folder: Path) -> list[dict[str, float]]:
    """What the offline files of all sessions tell, in the order in which they were written."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for message in messages(path):
            one = Record.FromString(message)
            if one.WhichOneof("record_type") == "history":
                items = ((i.key or "/".join(i.nested_key), i.value_json) for i in one.history.item)
                found.append({name: json.loads(value) for name, value in items})
    return found


@pytest.mark.skipif(not INSTALLED, reason="needs the package wandb")
def test_the_same_figures_with_tokens_as_the_steps(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "config.toml").write_text("seed = 1\n")
    log = open_log(tmp_path, wandb="gpt")
    for step in (1, 2, 3):
        log.step(record(step) | {"sources": {"web": {"tokens": 10, "epochs": 0.1}}})
    log.evaluation({"step": 3, "tokens": 3000, "validation_loss": 2.0})
    log.samples(["once < upon"])
    log.samples(png(np.zeros((4, 6, 3), np.uint8)))
    log.close()
    first = (tmp_path / "wandb_id").read_text()
    # Goes on behind a crash: the same run of the server.
    log = open_log(tmp_path, 2, wandb="gpt")
    log.step(record(3))
    log.close()
    assert (tmp_path / "wandb_id").read_text() == first
    read = points(tmp_path)
    losses = [(p["_step"], p["train/loss"]) for p in read if "train/loss" in p]
    assert losses == [(1000, 5.0), (2000, 2.5), (3000, 5 / 3), (3000, 5 / 3)]
    assert any(p.get("x_sources/web/epochs") == 0.1 for p in read)
    assert any(p.get("validation/validation_loss") == 2.0 for p in read)
    texts = [path.read_text() for path in tmp_path.glob("wandb/*/files/media/html/samples/*.html")]
    assert any("once &lt; upon" in text for text in texts)
    assert list(tmp_path.glob("wandb/*/files/media/images/samples*.png"))


@pytest.mark.skipif(not INSTALLED, reason="needs the package wandb")
def test_a_server_that_lets_nobody_in(tmp_path, monkeypatch, caplog):
    import wandb

    wandb.teardown()  # it remembers the environment of its first run
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UsageError, match=r'log.wandb = "gpt": .*export WANDB_MODE=offline'):
        open_log(tmp_path, wandb="gpt")
    # A run that goes on does so without it.
    log = open_log(tmp_path, 3, wandb="gpt")
    log.step(record(4))
    log.close()
    assert "going on without wandb: log.wandb" in caplog.text
    assert (4000, 5.0 / 4) in curve(tmp_path, "train/loss")
