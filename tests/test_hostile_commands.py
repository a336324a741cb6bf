"""No traceback for anything that an argument or a file can be: see tests.lib.hostile_commands."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from megagpt.cli import main
from megagpt.errors import visible
from tests.lib.hostile_commands import COMMANDS, FIXTURE, HEAVY, TRAINING, campaign


def test_no_argument_and_no_file_makes_a_traceback(tmp_path):
    done = campaign(tmp_path, 150, seed=14)
    assert not done.failures, "\n".join(done.failures)
    # Most is refused, and something of it was none the worse.
    assert done.codes[2] > 50 and done.codes[3] > 5 and done.codes[0] > 20


def test_nor_where_something_is_trained(tmp_path):
    done = campaign(tmp_path, 9, seed=3, commands=TRAINING)
    assert not done.failures, "\n".join(done.failures)
    assert done.codes[2] > 2 and sum(done.codes.values()) == 9


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_nor_do_hundreds_of_trainings(tmp_path):
    done = campaign(tmp_path, 300, seed=16, commands=HEAVY)
    assert not done.failures, "\n".join(done.failures)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_nor_do_thousands(tmp_path):
    done = campaign(tmp_path, 4000, seed=15)
    assert not done.failures, "\n".join(done.failures)


def test_the_commands_of_the_campaign_work(tmp_path):
    made = campaign(tmp_path, 0, seed=0)
    for line in COMMANDS:
        made.run(line.split(), "unspoilt")
    assert not made.failures and made.codes == {0: len(COMMANDS)}


def spoil(path, change):
    """Writes the JSON of a file anew, changed."""
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("line", "path", "change", "code", "message"),
    [
        (
            "data inspect corpus",
            "corpus/manifest.json",
            lambda tree: tree["totals"].update(text_bytes="many"),
            3,
            "} are no counts); prepare or copy the corpus again",
        ),
        (
            "generate weights",
            "weights/model.safetensors.index.json",
            lambda tree: tree["metadata"].update(tokenizer=None),
            3,
            "its metadata tells no step, tokens and tokenizer",
        ),
        (
            "data batch run --step 3",
            "run/metrics.jsonl",
            lambda tree: tree.update(samples=1),
            2,
            "had taken 1 by its end: metrics.jsonl is not what it was; look at run/config.toml",
        ),
        (
            "report run",
            "run/metrics.jsonl",
            lambda tree: tree.update(loss="low"),
            3,
            "metrics.jsonl, line 1: not a JSON object",
        ),
        (
            "report run",
            "run/metrics.jsonl",
            lambda tree: tree.update(time=1e300),
            3,
            "metrics.jsonl, line 1: not a JSON object",
        ),
    ],
)
def test_what_a_spoilt_file_is_told_as(
    tmp_path, monkeypatch, capsys, line, path, change, code, message
):
    shutil.copytree(FIXTURE, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    file = Path(path)
    if file.suffix == ".jsonl":
        step = {"step": 3, "loss": 1.0, "tokens": 768, "samples": 24, "digest": "0"}
        step["batch_tokens"] = 256
        file.write_text(json.dumps(step))
        spoil(file, change)
        file.write_text(2 * (file.read_text() + "\n"))
    else:
        spoil(file, change)
    assert main(line.split()) == code
    assert message in capsys.readouterr().err


def test_an_id_that_the_tokenizer_has_not_is_damage(tmp_path, monkeypatch, capsys):
    shutil.copytree(FIXTURE, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    shard = Path("corpus/corpus_00000.bin")
    shard.write_bytes(b"\xff\xff" + shard.read_bytes()[2:])
    assert main(["data", "inspect", "corpus"]) == 3
    assert "Invalid token for decoding: 65535; run megagpt data verify" in capsys.readouterr().err


def test_a_prompt_that_is_no_text(capsys, tmp_path):
    assert main(["generate", str(FIXTURE / "weights"), "--prompt", "\udcff"]) == 2
    assert "--prompt: not UTF-8 (" in capsys.readouterr().err
    (tmp_path / "p").write_bytes(b"\xff")
    assert main(["generate", str(FIXTURE / "weights"), "--prompt-file", str(tmp_path / "p")]) == 2
    assert "give a readable UTF-8 text file" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["cuda", "cuda:7", "meta", "hpu", "x", "", "\x1b"])
def test_devices_that_are_not_here(name, capsys):
    if name.startswith("cuda") and torch.cuda.is_available():
        return
    assert main(["generate", str(FIXTURE / "weights"), "--device", name]) == 2
    assert f"--device {visible(name)}: not on this machine (" in capsys.readouterr().err
