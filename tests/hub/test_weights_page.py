"""docs/how-to/weights.md: its commands run one after another, as they stand there."""

import shlex

from megagpt.cli import main
from megagpt.config import load_run
from megagpt.config.presets import ModelConfig
from tests.lib.weights import weights_folder
from tests.test_docs import ROOT, commands

SHAPE = {"n_layer": 2, "n_head": 2, "d_model": 32, "n_ctx": 64, "vocab_size": 257}


def test_its_commands_run(tmp_path, monkeypatch, capsys):
    page = ROOT / "docs" / "how-to" / "weights.md"
    monkeypatch.chdir(tmp_path)
    weights_folder(tmp_path / "runs" / "first", ModelConfig(**SHAPE), "bytes")
    lines = [line for line in commands(page) if line.startswith("megagpt ")]
    assert len(lines) == 5
    for line in lines:
        assert main(shlex.split(line)[1:]) == 0, line
    assert "back  whole" in capsys.readouterr().out
    assert load_run(tmp_path / "back" / "config.toml").model == ModelConfig(**SHAPE)
