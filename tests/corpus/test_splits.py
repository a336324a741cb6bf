"""What is held out for validation: by the text of a document, or by place."""

from pathlib import Path

import pytest

from megagpt.corpus.manifest import read_manifest
from megagpt.corpus.pipe import prepare
from megagpt.corpus.recipe import PrepareOptions
from megagpt.errors import UsageError
from tests.corpus.test_prepare import decoded, jsonl, sample_texts
from tests.corpus.test_told import options


def test_validation_depends_on_the_text_alone(tmp_path: Path) -> None:
    texts = sample_texts(400)
    splits = []
    for name, order in (("a", texts), ("b", texts[::-1])):
        path = jsonl(tmp_path / f"{name}.jsonl", order)
        prepare([path], PrepareOptions(output=tmp_path / name, validation_fraction=0.1, workers=1))
        splits.append(set(decoded(tmp_path / f"{name}-validation")))
        assert splits[-1] | set(decoded(tmp_path / name)) == set(texts)
    assert splits[0] == splits[1]
    assert 20 < len(splits[0]) < 60
    manifest = read_manifest(tmp_path / "a-validation")
    assert (manifest.split.name, manifest.split.validation_fraction) == ("validation", 0.1)


def test_a_split_by_place(tmp_path: Path) -> None:
    texts = ["0123456789" * 20, "abcdefghij", "x"]
    path = jsonl(tmp_path / "in.jsonl", [*texts, ""])
    given = options(tmp_path, validation_fraction=0.1, validation_by_place=True, deduplicate=True)
    summary = prepare([path], given)
    assert decoded(tmp_path / "out") == [texts[0][:180], "abcdefghi"]
    assert decoded(tmp_path / "out-validation") == [texts[0][180:], "j", "x"]
    assert summary.left_out == {"empty document": 1}
    split = read_manifest(tmp_path / "out-validation").split
    assert (split.name, split.validation_fraction) == ("validation", 0.1)
    assert split.rule.startswith("the last validation_fraction of the characters of each text")
    assert prepare([path], given).finished_before
    with pytest.raises(UsageError, match="validation_by_place was True, now it is None"):
        prepare([path], options(tmp_path, validation_fraction=0.1, deduplicate=True))
    with pytest.raises(UsageError, match="validation_by_place: needs validation_fraction"):
        prepare([path], options(tmp_path / "x", validation_by_place=True))


def test_asked_and_got_are_told(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("All the world's a stage. " * 99)
    text = prepare([tmp_path / "one.txt"], options(tmp_path, validation_fraction=0.1)).text()
    assert "validation: 0.00% of the documents, 0.00% of the tokens; 10.00% was asked for" in text
    assert f"note: {tmp_path}/out-validation is empty" in text and "--validation-by-place" in text
    given = options(tmp_path / "b", validation_fraction=0.1, validation_by_place=True)
    summary = prepare([tmp_path / "one.txt"], given)
    share = summary.tokens[1] / sum(summary.tokens)
    assert 0.08 < share < 0.12
    assert f"validation: 50.00% of the documents, {share:.2%} of the tokens" in summary.text()
    assert "is empty" not in summary.text()
