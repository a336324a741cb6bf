"""The scripts of data_prep as people run them, and `megagpt data inspect | verify | import`."""

import argparse
import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import datasets
import pytest

from megagpt.corpus.command import add_parsers, parser, prepare_by_place
from megagpt.corpus.download import fetch
from megagpt.corpus.huggingface import hub_documents, parse_address
from megagpt.corpus.inspect import describe, first_documents
from megagpt.corpus.manifest import read_manifest
from megagpt.errors import DamageError, UsageError
from megagpt.tokenizer import load_tokenizer
from tests.corpus.test_prepare import decoded, jsonl, sample_texts
from tests.lib.corpus import edit_manifest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "data_prep").glob("*.py"))
ENV = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def script(name: str, *args: object, stdin: str | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / f"data_prep/{name}.py"), *map(str, args)]
    return subprocess.run(command, env=ENV, capture_output=True, text=True, input=stdin)


def command(*args: object) -> int:
    parser = argparse.ArgumentParser()
    add_parsers(parser.add_subparsers())
    parsed = parser.parse_args([str(arg) for arg in args])
    return parsed.run(parsed)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_has_help(path: Path) -> None:
    result = script(path.stem, "--help")
    assert result.returncode == 0 and "--output" in result.stdout


def test_standard_library_becomes_a_corpus_once(tmp_path: Path) -> None:
    output = tmp_path / "data/python-stdlib"
    result = script("python_stdlib", "--output", output)
    assert result.returncode == 0, result.stderr
    assert "empty document" in result.stdout and "longest document" in result.stdout
    texts = decoded(output)
    assert len(texts) > 500 and (output.parent / "python-stdlib-validation").is_dir()
    assert not any("/test/" in entry["path"] for entry in read_manifest(output).sources)
    again = script("python_stdlib", "--output", output)
    assert again.returncode == 0 and "finished already" in again.stdout
    assert command("verify", output, f"{output}-validation") == 0


def test_standard_input_and_exit_codes(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"body": text}) + "\n" for text in sample_texts(20))
    arguments = ("-", "--output", tmp_path / "out", "--text-field", "body", "--workers", 2)
    result = script("tokenize_corpus", *arguments, stdin=lines)
    assert result.returncode == 0, result.stderr
    assert decoded(tmp_path / "out") == sample_texts(20)
    again = script("tokenize_corpus", *arguments, stdin="")
    assert again.returncode == 0 and "finished already" in again.stdout
    wrong = script("tokenize_corpus", "nothing.txt", "--output", tmp_path / "x")
    assert wrong.returncode == 2 and "megagpt: input nothing.txt" in wrong.stderr
    bad = script("tokenize_corpus", "-", "--output", tmp_path / "y", "--strict", stdin="{\n")
    assert bad.returncode == 3 and "standard input:1: broken JSON" in bad.stderr


def test_local_data_sets_of_hugging_face(tmp_path: Path) -> None:
    texts = sample_texts(30)
    data = datasets.Dataset.from_dict({"text": texts, "id": list(range(30))})
    data.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"dev": data}).save_to_disk(str(tmp_path / "dict"))
    (tmp_path / "files").mkdir()
    jsonl(tmp_path / "files/train.jsonl", texts)
    for address in ("saved", "dict:dev", "files:train"):
        documents = hub_documents(f"hf:{tmp_path}/{address}", "text")
        assert list(documents.texts()) == texts
    with pytest.raises(UsageError, match="no column 'body'; its columns are text, id"):
        hub_documents(f"hf:{tmp_path}/saved", "body")
    with pytest.raises(UsageError, match="cannot be opened"):
        hub_documents(f"hf:{tmp_path}/dict:train", "text")
    out = tmp_path / "out"
    result = script("openwebtext", "--source", f"hf:{tmp_path}/saved", "--output", out)
    assert result.returncode == 0, result.stderr
    assert decoded(out) == texts


def test_addresses_of_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_address("hf:owner/name") == ("owner/name", None, "train")
    assert parse_address("hf:owner/name/config:test") == ("owner/name", "config", "test")
    assert parse_address("hf:squad:validation") == ("squad", None, "validation")
    assert parse_address("hf:./a/b/c/d") == ("a/b/c/d", None, "train")
    with pytest.raises(UsageError, match="must be hf:NAME"):
        parse_address("hf:a//b")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE is set.*check the name and the network"):
        hub_documents("hf:owner/name", "text")


def test_text8_and_tiny_shakespeare_split_by_place(tmp_path: Path) -> None:
    text = "anarchism originated as a term of abuse " * 50
    (tmp_path / "text8").write_text(text)
    out = tmp_path / "text8-out"
    result = script("text8", "--file", tmp_path / "text8", "--output", out)
    assert result.returncode == 0, result.stderr
    names = ("", "-validation", "-test")
    parts = [decoded(out.with_name(out.name + name))[0] for name in names]
    assert "".join(parts) == text
    assert [len(part) for part in parts] == [1800, 100, 100]
    assert read_manifest(out).tokenizer_name == "bytes"
    splits = [read_manifest(out.with_name(out.name + name)).split for name in names]
    assert [split.name for split in splits] == ["train", "validation", "test"]
    assert splits[1].rule == "characters 1800 to 1900 of 2000"
    again = script("text8", "--file", tmp_path / "text8", "--output", out)
    assert again.returncode == 0 and again.stdout.count("finished already") == 3
    out = tmp_path / "shakespeare"
    result = script("tiny_shakespeare", "--file", tmp_path / "text8", "--output", out)
    assert result.returncode == 0, result.stderr
    validation = tmp_path / "shakespeare-validation"
    assert decoded(out)[0] + decoded(validation)[0] == text
    assert read_manifest(validation).split.name == "validation"
    (tmp_path / "text8").write_bytes(b"\xff")
    result = script("text8", "--file", tmp_path / "text8", "--output", tmp_path / "z")
    assert result.returncode == 3 and "not text8" in result.stderr


def test_enwik8_is_split_by_place_in_bytes(tmp_path: Path) -> None:
    content = "<text>é</text>".encode() * 100 + b"\xff"
    (tmp_path / "enwik8").write_bytes(content)
    out = tmp_path / "out"
    for _ in range(2):
        result = script("text8", "--enwik8", "--file", tmp_path / "enwik8", "--output", out)
        assert result.returncode == 0, result.stderr
    parts = []
    for name in ("", "-validation", "-test"):
        assert command("verify", f"{out}{name}") == 0
        (ids,) = first_documents(read_manifest(f"{out}{name}"), 9)
        assert ids[-1] == 256
        parts.append(ids[:-1].astype("u1").tobytes())
    assert b"".join(parts) == content, "cut within a character, and not of UTF-8"
    assert [len(part) for part in parts] == [1350, 75, 76]
    assert "test split, bytes 1425 to 1501 of 1501" in result.stdout


def test_downloads(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_text("abc")
    target = tmp_path / "in/target"
    assert fetch(source.as_uri(), target).read_text() == "abc"
    with pytest.raises(DamageError, match="target: sha256 ba7816bf8f01..., expected 000000000000"):
        fetch("unused://", target, "0" * 64)
    with pytest.raises(UsageError, match="cannot be downloaded .* put it at"):
        fetch("http://127.0.0.1:9/x", tmp_path / "other")


def test_a_trained_tokenizer_encodes_the_same_everywhere(tmp_path: Path) -> None:
    import tokenizers

    texts = sample_texts(400) + ["caf\u00e9 \u4e2d\u6587 12345 don't\n\n  indented"] * 3
    path = jsonl(tmp_path / "in.jsonl", texts)
    out = tmp_path / "data/mine.json"
    result = script("train_tokenizer", path, "--vocab-size", 320, "--output", out)
    assert result.returncode == 0, result.stderr
    assert "320 tokens; Hugging Face and tiktoken give the same ids on 403 documents" in (
        result.stdout
    )
    ours, theirs = load_tokenizer(out), tokenizers.Tokenizer.from_file(str(out))
    assert ours.n_vocab == theirs.get_vocab_size() == 320
    for text in [*texts[-5:], "unseen words, \U0001f600 and\tspaces   "]:
        assert ours.encode_ordinary(text) == theirs.encode(text).ids
        assert ours.decode(ours.encode_ordinary(text)) == text
    assert (
        script("tokenize_corpus", path, "--tokenizer", out, "--output", tmp_path / "o").returncode
        == 0
    )
    assert decoded(tmp_path / "o") == texts
    result = script("train_tokenizer", path, "--vocab-size", 9999, "--output", out)
    assert result.returncode == 2 and "give more text or a smaller --vocab-size" in result.stderr
    result = script("train_tokenizer", path, "--vocab-size", 9, "--output", out)
    assert result.returncode == 2 and "must be at least 257" in result.stderr


def test_a_text_split_by_place_into_the_current_folder(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "shakespeare").mkdir()
    monkeypatch.chdir(tmp_path / "shakespeare")
    args = parser("", ".").parse_args([])
    prepare_by_place(args, "0123456789", {"train": 90, "validation": 10})
    assert decoded(Path(".")) == ["012345678"]
    assert decoded(tmp_path / "shakespeare-validation") == ["9"]


def test_a_tokenizer_stays_where_another_does_not_pass(tmp_path, monkeypatch) -> None:
    from megagpt.corpus import train_bpe

    path = jsonl(tmp_path / "in.jsonl", sample_texts(50))
    out = tmp_path / "mine.json"
    asked = Namespace(
        vocab_size=270, output=out, sample_bytes=10**6, text_field="text", format="auto"
    )
    train_bpe.train_tokenizer([str(path)], asked)
    before = out.read_bytes()
    monkeypatch.setattr(train_bpe, "read_tokenizer_file", lambda file: load_tokenizer("bytes"))
    asked.vocab_size = 280
    with pytest.raises(DamageError, match="tiktoken and Hugging Face disagree on .*; choose ano"):
        train_bpe.train_tokenizer([str(path)], asked)
    assert out.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "mine.json"]


def test_inspect_shows_totals_lengths_and_text(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "in.jsonl", ["hello world", "x" * 5000, ""])
    script("tokenize_corpus", path, "--output", tmp_path / "out")
    text = describe(tmp_path / "out", documents=2, characters=20)
    assert "train split, 1 shards" in text and "gpt2: 50,257 tokens, END-OF-DOCUMENT 50256" in text
    assert "2 documents, " in text and "left out while preparing: 1 (empty document)" in text
    assert "document 0 (3 tokens):\nhello world<|endofte..." in text
    assert re.search(r" 2 to +3 +1 +#{40}", text) and re.search(r" 512 to 1,023 +1 ", text)
    assert command("inspect", tmp_path / "out", "--documents", 0) == 0


def test_inspect_refuses_another_tokenizer_and_missing_tokens(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "in.jsonl", ["hello"])
    script("tokenize_corpus", path, "--output", tmp_path / "out")
    good = read_manifest(tmp_path / "out").fingerprint
    edit_manifest(tmp_path / "out", tokenizer__fingerprint="0" * 64)
    with pytest.raises(DamageError, match="tokenizer gpt2 is another one .*expected 000000000000"):
        describe(tmp_path / "out")
    edit_manifest(tmp_path / "out", tokenizer__fingerprint=good)
    next((tmp_path / "out").glob("*.bin")).unlink()
    with pytest.raises(DamageError, match="cannot be read .*run megagpt data verify"):
        describe(tmp_path / "out")


def test_verify_command_names_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = jsonl(tmp_path / "in.jsonl", ["hello"])
    script("tokenize_corpus", path, "--output", tmp_path / "out")
    assert command("verify", tmp_path / "out") == 0
    assert "whole, 1 shards, 1 documents, 2 tokens" in capsys.readouterr().out
    path = tmp_path / "out/manifest.json"
    tree = json.loads(path.read_text())
    del tree["sha256"]
    path.write_text(json.dumps(tree))
    assert command("verify", tmp_path / "out") == 0
    assert "2 tokens; its manifest.json was written by an earlier" in capsys.readouterr().out
    edit_manifest(tmp_path / "out", tokenizer__fingerprint="0" * 64)
    assert command("verify", tmp_path / "out") == 3
    assert "tokenizer gpt2 is another one than" in capsys.readouterr().out
    file = next((tmp_path / "out").glob("*.bin"))
    file.write_bytes(file.read_bytes()[::-1])
    assert command("verify", tmp_path / "out") == 3
    assert f"{file}: sha256" in capsys.readouterr().out
