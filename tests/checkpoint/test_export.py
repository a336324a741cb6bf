"""A checkpoint cut anew is the same checkpoint; a model opens from it and from its weights."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megagpt.checkpoint import list_checkpoints, load_model, record, verify
from megagpt.checkpoint.export import INDEX, consolidate, reshape
from megagpt.checkpoint.slice_file import SliceReader, write_slices
from megagpt.cli import main
from megagpt.config import load_run
from megagpt.engine import split as splits
from megagpt.engine.slices import STATES, Slice, TensorShare
from megagpt.errors import DamageError, UsageError
from megagpt.files import file_sha256, sealed_json
from tests.lib.checkpoints import flip


def everything(folder: Path) -> dict[str, torch.Tensor]:
    reader = SliceReader(folder)
    return {f"{n}|{k}": reader.full(n, k) for n in reader.names for k in STATES}


def test_there_and_back_is_the_same_state(run, tmp_path, capsys):
    source = list_checkpoints(run)[-1]
    assert main(["checkpoint", "reshape", str(run), str(tmp_path / "three"), "--ranks", "3"]) == 0
    three = Path(capsys.readouterr().out.strip())
    assert verify(three) == [] and len(list(three.glob("rank_*"))) == 3
    one = reshape(tmp_path / "three", tmp_path / "one")
    assert len(list(one.glob("rank_*"))) == 1
    for folder in (three, one):
        found = everything(folder)
        assert all(torch.equal(found[key], value) for key, value in everything(source).items())
        state, old = record.read_record(folder), record.read_record(source)
        assert (state.step, state.updates, state.data) == (old.step, old.updates, old.data)


def test_a_tensor_split_is_joined(run, tmp_path):
    source = list_checkpoints(run)[-1]
    whole = everything(source)
    kinds = {"attn.c_attn.weight": "qkv", "mlp.c_proj.weight": "row", "mlp.c_fc.weight": "column"}
    for part in range(2):
        held = [parted(whole, name, kinds, part) for name in SliceReader(source).names]
        write_slices(tmp_path / f"rank_{part:05d}.safetensors", [h for h in held if h])
    for old in source.glob("rank_*"):
        old.unlink()
    files = [Path(shutil.copy(f, source)) for f in sorted(tmp_path.glob("rank_*"))]
    records = tuple(map(record.FileRecord.of, [*files, source / "config.toml"]))
    state = dataclasses.replace(record.read_record(source), files=records)
    record.write_record(source, state)
    again = everything(reshape(source, tmp_path / "new", ranks=3))
    assert all(torch.equal(again[key], value) for key, value in whole.items())


def parted(whole: dict, name: str, kinds: dict[str, str], part: int) -> Slice | None:
    """A tensor rank's part of a parameter; what is not split is saved by the first."""
    kind = next((k for end, k in kinds.items() if name.endswith(end)), "whole")
    if kind == "whole" and part:
        return None
    parts = 1 if kind == "whole" else 2
    held = {k: splits.take(whole[f"{name}|{k}"], kind, part, parts).contiguous() for k in STATES}
    return Slice(
        name=name,
        shape=tuple(held["fp32"].shape),
        split=TensorShare(kind=kind, part=part, parts=parts),
        start=0,
        numel=held["fp32"].numel(),
        owned=True,
        read=lambda key: held[key].view(-1),
        write=lambda key, value: None,
    )


def test_wrong_usage(run, tmp_path):
    with pytest.raises(UsageError, match="--ranks 0: must be 1 or more"):
        reshape(run, tmp_path / "x", ranks=0)
    with pytest.raises(UsageError, match="is there already; give another run folder"):
        reshape(run, run)
    one = SliceReader(list_checkpoints(run)[-1]).slice("ln_f.bias", 0, 4)
    with pytest.raises(NotImplementedError, match="a checkpoint's slices are not written to"):
        one.write("fp32", torch.zeros(4))


# --- consolidated weights and models --------------------------------------------------------------


@pytest.mark.parametrize("size", ["0", "-1", "nan", "inf", "1e9", "x", "9" * 400])
def test_sizes_of_files_that_are_none(run, tmp_path, capsys, size):
    with pytest.raises(SystemExit) as end:
        main(["checkpoint", "consolidate", str(run), str(tmp_path / "out"), f"--shard-gb={size}"])
    assert end.value.code == 2 and "argument --shard-gb: " in capsys.readouterr().err


def test_consolidated_files_are_the_model(run, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["checkpoint", "consolidate", str(run), str(out), "--shard-gb", "0.00005"]
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines() == [str(p) for p in sorted(out.iterdir())]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = {name: load_file(out / name) for name in set(index["weight_map"].values())}
    assert len(shards) > 1
    model, encoding, facts = load_model(run)
    named = dict(model.named_parameters())
    assert set(index["weight_map"]) == set(named)
    for name, file in index["weight_map"].items():
        assert torch.equal(shards[file][name], named[name])
    metadata = index["metadata"]
    for name in shards:
        with safe_open(out / name, framework="pt") as file:
            said = file.metadata()
        assert said["format"] == "pt" and said["orientation"] == metadata["orientation"]
    assert "mlp.c_proj are (out, in), as in torch.nn.Linear" in metadata["orientation"]
    assert named["h.0.mlp.c_fc.weight"].shape == (4 * 32, 32)
    files = {one["name"]: one["sha256"] for one in metadata["files"]}
    assert files == {p.name: file_sha256(p) for p in out.iterdir() if p.name != INDEX}
    assert index["metadata"]["total_size"] == sum(4 * p.numel() for p in named.values())
    source = list_checkpoints(run)[-1]
    assert load_run(out / "config.toml") == load_run(source / "config.toml")
    assert facts == {
        "checkpoint": source,
        "step": record.read_record(source).step,
        "tokens": record.read_record(source).tokens,
        "tokenizer": "bytes",
    }
    assert encoding.n_vocab == 257 and not model.training
    for there in (out, out / INDEX):
        assert main([*command[:3], str(there)]) == 2
        assert "not empty; give a folder that does not exist yet" in capsys.readouterr().err


def test_a_consolidation_that_was_killed_leaves_nothing_behind(run, tmp_path):
    left = tmp_path / ".out.megagpt.tmp"
    left.mkdir()
    (left / "model-00007-of-00009.safetensors").write_text("half")
    # What a user calls so is the user's.
    for name in ("out.tmp", "out.tmp.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    (tmp_path / "out").mkdir()
    found = [path.name for path in consolidate(run, tmp_path / "out")]
    assert found == [
        "config.toml",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    assert not left.exists()
    assert all((tmp_path / name / "mine").is_file() for name in ("out.tmp", "out.tmp.tmp"))


def test_weights_in_the_folder_where_one_is(run, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert Path("config.toml") in consolidate(run, Path())
    monkeypatch.chdir(tmp_path / "here")
    assert load_model(Path())[2]["step"] == record.read_record(list_checkpoints(run)[-1]).step


def test_a_consolidation_that_fails_leaves_nothing_behind(run, tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megagpt.checkpoint.export.write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        consolidate(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_load_model_opens_one_checkpoint_of_a_run_too(run):
    first = list_checkpoints(run)[0]
    _, _, facts = load_model(first)
    assert facts["checkpoint"] == first


def test_consolidated_weights_open_as_the_model(run, tmp_path):
    consolidate(run, tmp_path / "weights")
    (a, _, facts), (b, _, old) = load_model(tmp_path / "weights"), load_model(run)
    assert all(torch.equal(p, dict(b.named_parameters())[n]) for n, p in a.named_parameters())
    assert {k: facts[k] for k in ("step", "tokens", "tokenizer")} == {
        k: old[k] for k in ("step", "tokens", "tokenizer")
    }
    index = json.loads((tmp_path / "weights" / INDEX).read_text())
    del index["metadata"]["tokenizer"]
    (tmp_path / "weights" / INDEX).write_text(json.dumps(index))
    with pytest.raises(DamageError, match="not readable as consolidated weights"):
        load_model(tmp_path / "weights")


def test_a_folder_of_transformers_is_to_be_imported(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for name in (INDEX, "model.safetensors"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(UsageError, match="as transformers writes it; `megagpt import .* OUT`"):
            load_model(tmp_path)


SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture
def weights(run: Path, tmp_path: Path) -> Path:
    """Consolidated weights."""
    consolidate(run, tmp_path / "weights")
    return tmp_path / "weights"


def reindexed(folder: Path, change: Callable[[dict], None], seal: bool = True) -> None:
    """Changes the index; with `seal`, its own checksum is right."""
    tree = json.loads((folder / INDEX).read_text())
    change(tree)
    (folder / INDEX).write_text(sealed_json(tree) if seal else json.dumps(tree))


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", ""])
@pytest.mark.parametrize("seal", [True, False], ids=["sealed", "of before"])
def test_an_index_names_files_of_its_own_folder_only(weights, name, seal):
    shutil.copy(weights / SHARD, weights.parent / "x")

    def change(tree: dict) -> None:
        tree["weight_map"]["wte.weight"] = name
        if not seal:
            as_before(tree)

    reindexed(weights, change, seal)
    with pytest.raises(DamageError, match="is no name of a file in this folder"):
        load_model(weights)


def as_before(tree: dict) -> None:
    """An index as it was written in November 2026."""
    for key in ("vocabulary", "orientation", "files"):
        tree["metadata"].pop(key, None)
    tree.pop("sha256", None)


def test_weights_of_before_open_with_a_word_of_warning(weights, run, capsys, caplog):
    reindexed(weights, as_before, seal=False)
    model, expected = load_model(weights)[0], load_model(run)[0].state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    assert "of an earlier megagpt, without checksums; write the weights again" in caplog.text
    reindexed(weights, lambda tree: tree["weight_map"].pop("ln_f.bias"), seal=False)
    with pytest.raises(DamageError, match="no parameter ln_f.bias .*; write the weights again"):
        load_model(weights)


@pytest.mark.parametrize("name", ["weight_map", "metadata", "sha256"])
def test_an_index_without_a_checksum_is_one_of_before_or_none(weights, name):
    reindexed(weights, lambda tree: tree.pop(name), seal=False)
    with pytest.raises(DamageError, match="its checksum is not that of its content"):
        load_model(weights)


def test_weights_verify_as_checkpoints_do(weights, capsys):
    assert main(["checkpoint", "verify", str(weights)]) == 0
    assert capsys.readouterr().out == "weights  whole\n"
    shutil.copy(weights / SHARD, weights / "model-00001-of-00001 (copy).safetensors")
    assert main(["checkpoint", "verify", str(weights)]) == 0
    named = "not in its manifest, and read by nothing: 'model-00001-of-00001 (copy).safetensors'"
    assert capsys.readouterr().out == f"weights  whole; {named}\n"
    flip(weights / SHARD)
    assert main(["checkpoint", "verify", str(weights)]) == 3
    assert f"{SHARD}: its checksum is not the manifest's" in capsys.readouterr().out
    assert main(["generate", str(weights)]) == 3
    assert f"{SHARD}: its checksum is not the manifest's" in capsys.readouterr().err
    (weights / SHARD).unlink()
    with pytest.raises(DamageError, match=f"{SHARD}: cannot be read"):
        load_model(weights)


def test_a_weight_that_no_checksum_speaks_of_is_not_read(weights):
    shutil.copy(weights / SHARD, weights / "more.safetensors")
    reindexed(weights, lambda tree: tree["weight_map"].update({"wte.weight": "more.safetensors"}))
    with pytest.raises(DamageError, match="no checksum of more.safetensors"):
        load_model(weights)
