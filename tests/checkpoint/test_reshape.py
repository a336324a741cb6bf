"""A checkpoint cut anew is the same checkpoint; consolidated weights open as a model too."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from megagpt.checkpoint import list_checkpoints, load_model, record, verify
from megagpt.checkpoint.export import INDEX, consolidate, reshape
from megagpt.checkpoint.slice_file import SliceReader, write_slices
from megagpt.cli import main
from megagpt.engine import split as splits
from megagpt.engine.slices import STATES, Slice, TensorShare
from megagpt.errors import DamageError, UsageError
from tests.lib.distributed import undisturbed


@pytest.fixture
def run(tmp_path: Path) -> Path:
    shutil.copytree(undisturbed() / "run" / "checkpoints", tmp_path / "run" / "checkpoints")
    return tmp_path / "run"


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
