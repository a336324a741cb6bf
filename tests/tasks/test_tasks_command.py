"""`megagpt evaluate --task`: what it tells people and programs, and what it refuses."""

import json
from pathlib import Path

import pytest

from megagpt.cli import main
from megagpt.config.presets import ModelConfig
from tests.lib.corpus import write_corpus
from tests.lib.weights import weights_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, and questions of three kinds."""
    root = tmp_path_factory.mktemp("tasks")
    config = ModelConfig(n_layer=1, n_head=2, d_model=16, n_ctx=128, vocab_size=257)
    weights_folder(root / "model", config, "bytes")
    rows = [
        {"context": f"What is {n}?", "choices": ["odd", "even"], "gold": n % 2} for n in range(4)
    ]
    (root / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "lambada.jsonl").write_text(json.dumps({"text": "a sentence that ends"}))
    (root / "text8").write_text("some text in small letters " * 40)
    write_corpus(root / "seen", ["What is 1? odd", "nothing else"])
    return root


def said(capsys: pytest.CaptureFixture[str], folder: Path, *words: object) -> str:
    assert main(["evaluate", str(folder / "model"), *map(str, words)]) == 0
    return capsys.readouterr().out


def test_what_programs_are_told(capsys, folder):
    words = ["--task", f"choice={folder / 'own.jsonl'}", "--task", "2D+", "--limit", 3]
    words += ["--shots", 2, "--task", f"text8={folder / 'text8'}", "--begin-document"]
    told = json.loads(said(capsys, folder, *words, "--json"))
    assert told["confidence"] == 0.95 and told["n_ctx"] == 128 and told["pf_days"] == "NaN"
    own, sums, text8 = told["tasks"]
    assert (own["task"], own["examples"], own["shots"], own["chance"]) == ("choice", 3, [2, 2], 0.5)
    names = ["acc", "acc_norm", "acc_bytes", "acc_tokens", "acc_unconditional"]
    assert list(own["figures"]) == names
    assert all(one["low"] <= one["value"] <= one["high"] for one in own["figures"].values())
    assert sums["source"] == "made here, seed 0" and sums["shots"] == [2, 2]
    # Of all 2,000 sums, not of the three.
    assert 0.005 < sums["chance"] < 0.02 and sums["examples"] == 3
    assert set(sums["figures"]) == {"exact_match", "acc", "perplexity"}
    assert text8["headline"] == "bits_per_character" and text8["parts"] == {}
    again = json.loads(said(capsys, folder, *words, "--json"))
    assert again == told


def test_what_people_are_told(capsys, folder):
    words = ["--task", f"choice={folder / 'own.jsonl'}", "--training-data", folder / "seen"]
    lines = said(capsys, folder, *words, "--task", f"lambada={folder / 'lambada.jsonl'}")
    lines = lines.splitlines()
    assert lines[0] == f"choice ({folder / 'own.jsonl'}): 4 examples, K = 0"
    assert lines[1] == "  the choice that the model finds most likely"
    assert lines[2].startswith("  acc ") and "95%: " in lines[2] and "chance 50%" in lines[2]
    assert lines[2].endswith("<- the GPT-3 paper") and lines[3].endswith("<- EleutherAI's tables")
    assert lines[7:9] == ["  clean: none", "  dirty: none"]
    assert lines[9].startswith("  short ") and lines[9].endswith("4 examples")
    assert "last word, every token of it the likeliest" in lines[11]


def test_the_comparison_with_the_paper(capsys, folder):
    (folder / "paper").mkdir()
    (folder / "paper" / "words.txt").write_text("letters\nanagram\ncasino\n")
    words = ["--task", f"gpt3={folder / 'paper'}", "--limit", 1]
    lines = said(capsys, folder, *words, "--shots", 1).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("GPT-3's tasks"))
    assert "our compute is not known" in lines[start + 1]
    assert lines[start + 3].split()[-8:] == "125M 350M 760M 1.3B 2.7B 6.7B 13B 175B".split()
    row = next(line for line in lines[start:] if line.startswith("two_digit_addition"))
    assert row.split()[1] == "one-shot" and row.split()[-8:] == ["-"] * 7 + ["99.6?"]
    assert lines[-1] == f"without storycloze: no storycloze.jsonl in {folder / 'paper'}"
    assert len([line for line in lines if line.startswith("without ")]) == 7


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to evaluate: give --data DIR, --task NAME or --harness TASKS"),
        (["--data", "x", "--task", "2D+"], "--data and --task: give one of them at a time"),
        (["--task", "2D+", "--by-document"], "--by-document: is for --data; leave it out"),
        (["--data", "x", "--all-checkpoints"], "--all-checkpoints: is for --task; leave it out"),
        (["--data", "x", "--limit", "3"], "--limit: is for --task and --harness; leave it out"),
        (["--harness", "x", "--stride", "3"], "--stride: is for --data and --task; leave it out"),
        (["--task", "2D+", "--include-path", "x"], "--include-path: is for --harness; leave"),
        (["--task", "2D+", "--max-tokens", "-5"], "--max-tokens -5: must be 0 (all) or more"),
        (["--data", "x", "--by-document", "--stride", "8"], "scores every document whole"),
        (["--task", "2D+", "--shots", "501"], "--shots 501: must be 0 to 500"),
    ],
)
def test_what_is_refused(capsys, folder, words, message):
    assert main(["evaluate", str(folder / "model"), *words]) == 2
    assert message in capsys.readouterr().err
