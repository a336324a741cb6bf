"""`megagpt evaluate`: what it reads, what it tells people and programs, what it refuses."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from megagpt import cli
from megagpt.checkpoint import list_checkpoints
from megagpt.checkpoint.export import consolidate
from megagpt.cli import main
from megagpt.errors import UsageError
from megagpt.use import evaluate as command
from megagpt.use.score import totals
from tests.lib.distributed import undisturbed
from tests.use.test_evaluate import last_validation


def said(capsys: pytest.CaptureFixture[str], *words: object) -> dict:
    assert main(["evaluate", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_command_reads_runs_checkpoints_and_consolidated_weights(capsys, tmp_path):
    root = undisturbed()
    data = ("--data", root / "validation")
    newest = list_checkpoints(root / "run")[-1]
    found = said(capsys, root / "run", *data)
    assert found["checkpoint"] == str(newest)
    assert (found["n_ctx"], found["stride"], found["dtype"]) == (32, 32, "fp32")
    [result] = found["results"]
    assert result["data"] == str(root / "validation") and result["documents"] == 60
    assert set(result["loss"]) == {"value", "low", "high"}
    assert result["loss"]["low"] < result["loss"]["value"] < result["loss"]["high"]
    consolidate(root / "run", tmp_path / "weights")
    for place in (newest, tmp_path / "weights"):
        again = said(capsys, place, *data)
        assert again["results"] == found["results"] and again["step"] == found["step"]
    first = list_checkpoints(root / "run")[0]
    step = int(first.name.removeprefix("step_"))
    older = said(capsys, root / "run", *data, "--checkpoint", step)
    assert older["checkpoint"] == str(first) and older["step"] == step
    assert older["results"][0]["loss"]["value"] > result["loss"]["value"]


def test_the_command_tells_people(capsys, caplog):
    root = undisturbed()
    words = ["--data", str(root / "validation"), "--data", str(root / "train"), "--max-tokens"]
    with caplog.at_level("INFO"):
        assert main(["evaluate", str(root / "run"), *words, "512"]) == 0
    assert "trained on" in caplog.text and "step_" in caplog.text
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert "validation: 512 tokens and " in lines[0] and "tokens left out" in lines[0]
    assert lines[1].startswith("  loss") and "nats per token   95%: " in lines[1]
    assert lines[2].startswith("  perplexity") and lines[3].startswith("  bits per byte")


def test_ids_that_stand_for_no_text_have_no_bytes():
    nats, tokens = np.array([3.0, 5.0]), np.array([4, 4])
    image = totals(Path("digits"), int(tokens.sum()), nats, tokens, np.zeros(2, np.int64))
    first, *figures = command._lines(image)
    assert first == "digits: 8 tokens of 2 documents"
    assert [line.split()[0] for line in figures] == ["loss", "perplexity"]


def test_16_bits_are_the_runs_own_figure_in_16_bits(capsys):
    """The run trained in bf16; DeepSpeed's model and the loaded one round the same weights."""
    root = undisturbed()
    own = last_validation(root / "run")["validation_loss"]
    words = ("--data", root / "validation", "--max-tokens", 16 * 32)
    found = said(capsys, root / "run", *words, "--dtype", "bf16")["results"][0]["loss"]["value"]
    exact = said(capsys, root / "run", *words)["results"][0]["loss"]["value"]
    assert found == pytest.approx(own, rel=1e-3)
    assert exact == pytest.approx(own, rel=1e-2)


def test_a_checkpoint_that_is_not_there(capsys):
    root = undisturbed()
    words = ["evaluate", str(root / "run"), "--data", str(root / "validation")]
    assert main([*words, "--checkpoint", "3"]) == 2
    steps = [str(int(p.name.removeprefix("step_"))) for p in list_checkpoints(root / "run")]
    expected = f"has no checkpoint of this step; there are: {', '.join(steps)}"
    assert expected in capsys.readouterr().err
    with pytest.raises(UsageError, match="there are: none"):
        command.run(parse(root / "train", "--data", root / "train", "--checkpoint", 1))


def test_a_device_that_is_not_there():
    root = undisturbed()
    for device in ("nonsense", "cuda:99"):
        with pytest.raises(UsageError, match=f"--device {device}: not on this machine"):
            command.run(parse(root / "run", "--data", root / "train", "--device", device))


def parse(*words: object) -> argparse.Namespace:
    return cli.parser("evaluate").parse_args(["evaluate", *map(str, words)])
