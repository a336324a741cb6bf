"""Where weights of others lie, and the tokenizer that comes along with them."""

import json
import logging

import pytest

from megagpt.checkpoint.export import open_weights
from megagpt.cli import main
from megagpt.errors import UsageError
from megagpt.hub.importing import import_model
from megagpt.tokenizer import fingerprint, load_tokenizer
from tests.lib.foreign import SIZES, same_logits, theirs, transformers


def test_the_tokenizer_comes_along(tmp_path, caplog):
    folder = tmp_path / "theirs"
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**SIZES | {"vocab_size": 50_257, "n_embd": 4, "n_layer": 1})
    )
    model.save_pretrained(folder)
    from megagpt.tokenizer.gpt2 import gpt2_merges
    from megagpt.tokenizer.json import tokenizer_json

    words = tokenizer_json(gpt2_merges())["model"]["vocab"]
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in gpt2_merges())]
    for vocabulary, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        ids = words | {"<|endoftext|>": len(words)}
        (folder / vocabulary).write_text(json.dumps(ids))
        (folder / merges).write_text("\n".join(lines) + "\n", encoding="utf-8")
        import_model(str(folder), tmp_path / vocabulary)
        found = open_weights(tmp_path / vocabulary)
        assert fingerprint(found.tokenizer()) == fingerprint(load_tokenizer("gpt2"))
        (folder / vocabulary).write_text(json.dumps(ids | {"a": ids["b"]}))
        with caplog.at_level(logging.WARNING):
            import_model(str(folder), tmp_path / f"{vocabulary}-other")
        assert "its ids are not GPT-2's" in caplog.text
        assert "name one with --tokenizer" in caplog.text
        (folder / merges).write_text("a\n")
        caplog.clear()
        import_model(str(folder), tmp_path / f"{vocabulary}-broken")
        assert "not GPT-2's merges" in caplog.text
        (folder / vocabulary).unlink()
    with pytest.raises(UsageError, match="not empty; give a folder that does not exist yet"):
        import_model(str(folder), folder)


def test_rows_that_are_no_token_are_cut_when_the_tokenizer_is_named(tmp_path):
    config = transformers.GPT2Config(**SIZES | {"vocab_size": 320})
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "theirs")
    import_model(str(tmp_path / "theirs"), tmp_path / "in", tokenizer="bytes")
    found = open_weights(tmp_path / "in")
    assert found.config.model.vocab_size == 257 and found.read("wte.weight").shape == (257, 16)
    with pytest.raises(UsageError, match="'gpt2' has 50257 tokens, but the model 320"):
        import_model(str(tmp_path / "theirs"), tmp_path / "other", tokenizer="gpt2")


def test_places_that_hold_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["import", str(tmp_path / "empty"), str(tmp_path / "out")]) == 2
    assert "nothing here that can be imported; give a folder of" in capsys.readouterr().err
    assert main(["import", "/no/such/folder", str(tmp_path / "out")]) == 2
    assert "/no/such/folder: is not there; give" in capsys.readouterr().err
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert main(["import", "nobody/nothing", str(tmp_path / "out")]) == 2
    assert "no repository that the Hugging Face hub gives" in capsys.readouterr().err


def test_a_name_of_the_hub_is_read_from_its_cache(tmp_path, monkeypatch):
    """The layout that huggingface_hub keeps: what was fetched once needs no network."""
    repository = tmp_path / "cache" / "models--somebody--tiny"
    (repository / "refs").mkdir(parents=True)
    commit = "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs" / "main").write_text(commit)
    model = theirs()
    model.save_pretrained(repository / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    import_model("somebody/tiny", tmp_path / "in", tokenizer="bytes")
    same_logits(tmp_path / "in", model)
