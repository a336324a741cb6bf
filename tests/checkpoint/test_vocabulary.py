"""The vocabulary goes with the weights, and is compared wherever both are there."""

import json
import shutil
from pathlib import Path

import pytest

from megagpt.checkpoint import list_checkpoints, load_model, record, verify
from megagpt.checkpoint.export import INDEX, consolidate, reshape
from megagpt.cli import main
from megagpt.config import load_run
from megagpt.corpus.manifest import read_manifest
from megagpt.errors import DamageError, UsageError
from megagpt.files import sealed_json
from megagpt.order.loader import training_loader
from megagpt.tokenizer import END_OF_DOCUMENT, fingerprint, load_tokenizer
from megagpt.tokenizer.json import write_tokenizer_file
from tests.lib.checkpoints import flip
from tests.lib.corpus import edit_manifest
from tests.lib.distributed import group_of_one
from tests.lib.flips import FIXTURE, train_to_the_end

CORPORA = ("corpus", "corpus-validation")
OVERRIDES = ("checkpoint.keep_last=9", "evaluate.samples=1", "evaluate.sample_tokens=8")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fixture's run, begun by the code of November 2026, and trained to its end; read only."""
    folder = tmp_path_factory.mktemp("trained") / "copy"
    shutil.copytree(FIXTURE, folder)
    with pytest.MonkeyPatch.context() as patch, group_of_one():
        patch.chdir(folder)
        train_to_the_end(load_run("run.toml", OVERRIDES))
    return folder


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, to be changed at will, in which commands run."""
    shutil.copytree(trained, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def other_tokenizer(path: Path) -> str:
    """A tokenizer of as many tokens as the fixture's, with other merges; its fingerprint."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    merges = [(a, b) for a in "zqxj" for b in letters][: 300 - 257]
    write_tokenizer_file(path, merges, END_OF_DOCUMENT)
    assert load_tokenizer(path).n_vocab == 300
    return fingerprint(load_tokenizer(path))


def another_corpus() -> str:
    """The same shards under another vocabulary, as their manifests tell; its fingerprint."""
    for name in CORPORA:
        path = Path(name) / "tokenizer.json"
        known = other_tokenizer(path)
        record_of = record.FileRecord.of(path).sha256
        edit_manifest(Path(name), tokenizer__fingerprint=known, tokenizer__sha256=record_of)
    return known


def text_of(folder: Path) -> str:
    """What `generate` prints."""
    model, encoding, _ = load_model(folder)
    return encoding.decode(list(range(256, model.config.vocab_size - 1)))


def test_every_checkpoint_carries_it_with_its_digest(here):
    old, *new = list_checkpoints(Path("run"))
    content = Path("corpus/tokenizer.json").read_bytes()
    assert new and not (old / "tokenizer.json").exists()
    for folder in new:
        saved = record.read_record(folder)
        assert (folder / "tokenizer.json").read_bytes() == content
        assert "tokenizer.json" in {file.name for file in saved.files}
        assert saved.data["vocabulary"] == read_manifest("corpus").fingerprint
        assert verify(folder) == []
    assert (reshape(Path("run"), Path("cut"), 3) / "tokenizer.json").read_bytes() == content


def test_what_carries_it_needs_no_corpus_and_heeds_no_other(here, capsys):
    newest, weights = list_checkpoints(Path("run"))[-1], Path("weights-2")
    expected = text_of(newest)
    consolidate(Path("run"), weights)
    index = json.loads((weights / INDEX).read_text())["metadata"]
    assert index["vocabulary"] == read_manifest("corpus").fingerprint
    assert (weights / "tokenizer.json").read_bytes() == Path("corpus/tokenizer.json").read_bytes()
    another_corpus()
    assert text_of(newest) == text_of(weights) == expected
    # The checkpoint is whole; its run's data are not what they were.
    assert main(["checkpoint", "verify", str(newest)]) == 0
    said = "whole; of another tokenizer by now: 'corpus', 'corpus-validation'\n"
    assert capsys.readouterr().out.endswith(said)
    assert main(["evaluate", str(newest), "--data", "corpus"]) == 2
    assert "is not the model's" in capsys.readouterr().err
    for name in CORPORA:
        shutil.rmtree(name)
    assert text_of(newest) == text_of(weights) == expected
    assert main(["checkpoint", "verify", str(newest)]) == 0
    assert main(["generate", str(weights), "--max-tokens", "3", "--seed", "1"]) == 0


def test_another_one_in_its_place_is_damage(here):
    newest, weights = list_checkpoints(Path("run"))[-1], Path("weights-2")
    consolidate(Path("run"), weights)
    for folder in (newest, weights):
        other_tokenizer(folder / "tokenizer.json")
        with pytest.raises(DamageError, match="tokenizer.json: .* but the manifest says"):
            load_model(folder)
    # Nor when its checksum is right.
    files = [path for path in newest.iterdir() if path.name != "manifest.json"]
    tree = json.loads((newest / "manifest.json").read_text())
    tree["files"] = [vars_of(record.FileRecord.of(path)) for path in sorted(files)]
    (newest / "manifest.json").write_text(sealed_json(tree))
    assert "another one than the tokens were made with" in verify(newest)[0]
    with pytest.raises(DamageError, match="another one than the tokens were made with"):
        load_model(newest)


def vars_of(one: record.FileRecord) -> dict[str, object]:
    return {"name": one.name, "bytes": one.bytes, "sha256": one.sha256}


def test_a_resume_compares_it_with_the_corpus(here):
    shutil.rmtree(list_checkpoints(Path("run"))[-1])
    config = load_run("run.toml", OVERRIDES)
    # The file alone: the corpus contradicts itself.
    flip(Path("corpus/tokenizer.json"))
    with group_of_one(), pytest.raises(DamageError, match="corpus/tokenizer.json"):
        train_to_the_end(config)
    known = another_corpus()
    message = rf"was trained with the tokenizer corpus/tokenizer.json .*{known[:12]}.*, whose ids"
    with group_of_one(), pytest.raises(UsageError, match=message):
        train_to_the_end(config)


def test_checkpoints_of_before_find_it_where_it_was(here, caplog):
    old = list_checkpoints(Path("run"))[0]
    expected = text_of(old)
    assert text_of(Path("weights")) == expected
    # Their weights carry it from now on.
    consolidate(old, Path("carried"))
    other_tokenizer(Path("corpus/tokenizer.json"))
    for folder in (old, Path("weights")):
        with pytest.raises(DamageError, match="another one than the tokens were made with"):
            load_model(folder)
    assert text_of(Path("carried")) == expected
    consolidate(old, Path("without"))
    assert "the weights will not carry their tokenizer: tokenizer corpus/token" in caplog.text
    assert not Path("without/tokenizer.json").exists() and verify(old) == []


def test_a_tokenizer_that_nobody_knows_is_not_carried(here, caplog):
    for name in CORPORA:
        edit_manifest(Path(name), tokenizer__name="klingon", tokenizer__fingerprint="0" * 64)
    loader = training_loader(load_run("run.toml"))
    assert loader.vocabulary() == b""
    assert "checkpoints will not carry their tokenizer: unknown tokenizer klingon" in caplog.text
    for name in CORPORA:
        edit_manifest(Path(name), tokenizer__fingerprint="")
    assert training_loader(load_run("run.toml")).vocabulary() == b""
