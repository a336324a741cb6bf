"""slices.json: a rank opens what it needs; the index is believed as far as the files agree."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from megagpt.checkpoint import (
    CheckpointRecord,
    list_checkpoints,
    record,
    resume,
    verify,
)
from megagpt.checkpoint.slice_file import SliceReader, write_slices
from megagpt.checkpoint.slice_index import index_of_packed, index_text, packed, parse_index
from megagpt.cli import main
from megagpt.engine.slices import Slice, TensorShare
from megagpt.errors import DamageError
from tests.lib.checkpoints import fingerprint, opened

VALUES = {"a": torch.arange(12.0), "b": torch.arange(100.0, 104.0)}
CUT = [[("a", 0, 5)], [("a", 5, 7)], [("b", 0, 4)], []]


def held(name: str, start: int, numel: int) -> Slice:
    return Slice(
        name=name,
        shape=tuple(VALUES[name].shape),
        split=TensorShare(),
        start=start,
        numel=numel,
        owned=True,
        read=lambda key: VALUES[name][start : start + numel],
        write=lambda key, value: None,
    )


def written(folder: Path) -> str:
    """Files of four ranks, one of which holds nothing; their index."""
    ranks = [[held(*place) for place in own] for own in CUT]
    for rank, own in enumerate(ranks):
        write_slices(folder / f"rank_{rank:05d}.safetensors", own)
    return index_of_packed([packed(own) for own in ranks])


def test_only_the_files_that_hold_what_is_read_are_opened(tmp_path):
    index = written(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    # What is told is what the headers tell.
    assert index == index_text(opened(tmp_path).parameters)
    for name in (names[0], names[3]):
        (tmp_path / name).unlink()
    reader = SliceReader(tmp_path, index=index)
    assert torch.equal(reader.read(held("a", 6, 3), "fp32"), VALUES["a"][6:9])
    assert torch.equal(reader.full("b"), VALUES["b"])
    with pytest.raises(DamageError, match="rank_00000.safetensors: not a readable file of slices"):
        reader.full("a")


def test_cuts_that_are_alike_stand_there_once():
    alike = [dataclasses.replace(held("a", 0, 12), name=name) for name in "xyz"]
    index = index_of_packed([packed([]), packed([*alike, held("b", 0, 4)])])
    assert sorted(json.loads(index)["cuts"]) == ["1:0+12", "1:0+4"]
    assert parse_index(index)["z"].layout == ((12,), "whole", 1)


def test_files_that_hold_something_else_than_the_index_tells(tmp_path):
    index = written(tmp_path)
    reader = SliceReader(tmp_path, index=index.replace("0:0+5 1:5+7", "0:0+6 1:6+6"))
    assert reader.differences([0, 1, 2, 3]) == [
        f"{tmp_path}/rank_0000{rank}.safetensors: does not hold of 'a' what slices.json says"
        for rank in range(2)
    ]
    with pytest.raises(DamageError, match="rank_00000.* does not hold of 'a' what slices.json sa"):
        reader.full("a")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"parameters": {"a": {}}, "cuts": []}'])
def test_what_is_no_index(tmp_path, text):
    with pytest.raises(DamageError, match="slices.json: not a readable file of slices"):
        SliceReader(tmp_path, index=text)


def renewed(folder: Path, names: list[str]) -> None:
    """The manifest anew, of these files."""
    files = tuple(record.FileRecord.of(folder / name) for name in names)
    record.write_record(folder, dataclasses.replace(record.read_record(folder), files=files))


def test_a_checkpoint_of_an_earlier_version_has_no_index(run, config, engine):
    *_, older, newest = list_checkpoints(run)
    files = [file.name for file in record.read_record(newest).files]
    (newest / record.INDEX).unlink()
    renewed(newest, [name for name in files if name != record.INDEX])
    assert verify(newest) == []
    saved = resume(run, config, engine, fingerprint(run))
    assert saved is not None and saved.step == record.step_of(newest)
    reader = SliceReader(newest)
    for one in engine.slices():
        assert torch.equal(one.read("exp_avg"), reader.read(one, "exp_avg"))


def test_an_index_of_other_files_is_damage(run, config, engine, caplog, capsys):
    *_, older, newest = list_checkpoints(run)
    files = [file.name for file in record.read_record(newest).files]
    text = (newest / record.INDEX).read_text()
    first = json.loads(text)["cuts"][0]
    rank, _, place = first.split()[0].partition(":")
    (newest / record.INDEX).write_text(text.replace(first, f"{1 - int(rank)}:{place}", 1))
    renewed(newest, files)
    assert "what slices.json says" in verify(newest)[0]
    assert main(["checkpoint", "verify", str(newest)]) == 3
    assert "what slices.json says" in capsys.readouterr().out
    saved = resume(run, config, engine, fingerprint(run))
    assert saved is not None and saved.step == record.step_of(older)
    assert "what slices.json says" in caplog.text


def test_an_index_names_no_file_without_a_checksum(run, config, engine, caplog):
    *_, older, newest = list_checkpoints(run)
    names = [file.name for file in record.read_record(newest).files]
    names.remove("rank_00001.safetensors")
    (newest / "rank_00001.safetensors").rename(newest / "rank_00007.safetensors")
    tree = json.loads((newest / record.INDEX).read_text())
    tree["cuts"] = [re.sub(r"\b1:", "7:", cut) for cut in tree["cuts"]]
    (newest / record.INDEX).write_text(json.dumps(tree))
    renewed(newest, names)
    problem = "slices.json: names rank_00007.safetensors, but the manifest does not"
    assert problem in verify(newest)[0]
    saved = resume(run, config, engine, fingerprint(run))
    assert saved is not None and saved.step == record.step_of(older)
    assert problem in caplog.text


def test_an_index_that_is_no_text_is_damage(run):
    newest = list_checkpoints(run)[-1]
    (newest / record.INDEX).write_bytes(b"\xff{}")
    renewed(newest, [file.name for file in record.read_record(newest).files])
    assert "slices.json: not a readable file of slices" in verify(newest)[0]


def test_a_checkpoint_that_its_run_removes_meanwhile_is_not_damaged(run, capsys, monkeypatch):
    first, second, *_ = list_checkpoints(run)
    read = CheckpointRecord.__init__

    def retiring(self, **facts):
        read(self, **facts)
        if facts["step"] == record.step_of(first) and second.exists():
            second.rename(record.unfinished_of(second))

    monkeypatch.setattr(CheckpointRecord, "__init__", retiring)
    assert main(["checkpoint", "verify", str(run)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == [
        f"{first.name}  whole",
        f"{second.name}  no longer there: its run has removed it meanwhile",
    ]
