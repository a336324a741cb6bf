"""A run's checkpoints: damage of any file is found, the older one is loaded, nothing is lost."""

import dataclasses
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megagpt import checkpoint
from megagpt.checkpoint import list_checkpoints, load_model, record, resume, verify
from megagpt.checkpoint.export import consolidate
from megagpt.checkpoint.slice_file import SliceReader, write_slices
from megagpt.cli import main
from megagpt.config import RunConfig
from megagpt.engine import Engine
from megagpt.engine.slices import STATES, Slice
from megagpt.errors import DamageError, UsageError
from megagpt.files import sealed_json
from tests.lib.checkpoints import fingerprint, flip
from tests.lib.distributed import undisturbed

FILES = (
    "rank_00000.safetensors",
    "rank_00001.safetensors",
    "slices.json",
    "config.toml",
    "manifest.json",
    "tokenizer.json",
)


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    return {one.name: one.read("fp32").clone() for one in engine.slices()}


# --- what a run leaves --------------------------------------------------------------------------


def test_what_is_kept(config):
    # 2,048 tokens between checkpoints, the newest 3, and the first past each 4,096 for ever.
    folder = undisturbed() / "run" / "checkpoints"
    kept = [record.read_record(f) for f in list_checkpoints(folder.parent)]
    assert [m.tokens // 4096 for m in kept if m.milestone] == [1, 2, 3]
    assert kept[-1].tokens == config.schedule.end_tokens
    assert all(m.milestone for m in kept[:-3]) and len(kept) > 3
    assert (folder / "latest").read_text() == f"step_{kept[-1].step:08d}\n"
    assert not list(folder.glob("*.tmp"))
    state = kept[-1]
    assert state.samples == state.tokens // config.model.n_ctx
    assert (state.updates, state.skipped_steps) == (state.step, 0)
    assert state.layout == {"world": 2, "pipeline": 1, "tensor": 1}
    assert [f.name for f in state.files] == [*FILES[:4], "tokenizer.json"]


def test_bytes_on_the_disk_are_the_owned_slices_and_no_more(config):
    folder = list_checkpoints(undisturbed() / "run")[-1]
    reader = SliceReader(folder)
    numbers = sum(reader.numel(name) for name in reader.names)
    size = sum(f.stat().st_size for f in folder.glob("rank_*"))
    # fp32 weights and two moments; the rest is two headers.
    assert 12 * numbers < size < 12 * numbers + 40_000


# --- damage -------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [flip, truncate, remove])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_found_and_the_older_checkpoint_loaded(
    run: Path,
    config: RunConfig,
    engine: Engine,
    name: str,
    damage: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    *_, older, newest = list_checkpoints(run)
    damage(newest / name)
    assert any(name in problem for problem in verify(newest)) and not verify(older)
    with pytest.raises(DamageError, match=name):
        load_model(run)
    with pytest.raises(DamageError, match=name):
        consolidate(run, run / "out")
    saved = resume(run, config, engine, fingerprint(run))
    assert saved is not None and saved.step == record.read_record(older).step
    assert name in caplog.text and "damaged checkpoint" in caplog.text
    # Nothing is deleted, and the bad one is never looked at again.
    assert (newest.with_name(newest.name + ".damaged1")).is_dir()
    assert list_checkpoints(run)[-1] == older
    reader = SliceReader(older)
    for one in engine.slices():
        assert torch.equal(one.read("exp_avg_sq"), reader.read(one, "exp_avg_sq"))


def test_every_byte_of_a_manifest_counts(run):
    folder = list_checkpoints(run)[-1]
    path = folder / "manifest.json"
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        for change in (1, 4, 128):
            data = bytearray(whole)
            data[place] ^= change
            path.write_bytes(data)
            assert verify(folder), (place, change, data[max(0, place - 9) : place + 9])
    path.write_bytes(whole)
    assert verify(folder) == []


def test_no_whole_checkpoint_is_an_error_and_everything_stays(run, config, engine, caplog):
    before = weights(engine)
    print_of_data, folders = fingerprint(run), list_checkpoints(run)
    for number, folder in enumerate(folders):
        flip(folder / FILES[number % len(FILES)])
    with pytest.raises(DamageError, match="no checkpoint is whole .*restore one from a copy"):
        resume(run, config, engine, print_of_data)
    assert list_checkpoints(run) == folders
    assert all(folder.name in caplog.text for folder in folders)
    after = weights(engine)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_format_of_the_future_is_no_damage(run, config, engine, capsys):
    folders = list_checkpoints(run)
    for folder in folders[-2:]:
        state = record.read_record(folder)
        record.write_record(folder, dataclasses.replace(state, format=2))
    reason = "format 2, but this megagpt reads format 1; use the version that wrote it"
    with pytest.raises(UsageError, match=reason):
        resume(run, config, engine, fingerprint(run))
    # They stay where they are, and are listed and kept beside the others.
    assert list_checkpoints(run) == folders
    assert main(["checkpoint", "list", str(run)]) == 0
    assert reason in capsys.readouterr().out
    record.retire(run, 1)
    assert list_checkpoints(run)[-2:] == folders[-2:]
    assert main(["checkpoint", "verify", str(run)]) == 2
    assert reason in capsys.readouterr().err


def test_what_a_crash_left_is_removed(run, config, engine, caplog):
    caplog.set_level(logging.INFO)
    folders = list_checkpoints(run)
    left = run / "checkpoints" / "step_00000099.tmp"
    shutil.copytree(folders[-1], left)
    saved = resume(run, config, engine, fingerprint(run))
    assert saved is not None and list_checkpoints(run) == folders
    assert not list((run / "checkpoints").glob("*.tmp"))
    assert "step_00000099.tmp, which was never finished" in caplog.text


def test_what_a_crash_left_and_no_one_can_remove_ends_no_run(
    run, config, engine, caplog, monkeypatch
):
    left = run / "checkpoints" / "step_00000099.tmp"
    left.mkdir()
    monkeypatch.setattr(shutil, "rmtree", os.rmdir)
    (left / ".nfs0001").touch()
    saved = resume(run, config, engine, fingerprint(run))
    assert saved is not None and f"{left} is no checkpoint, but stays: Directory not" in caplog.text


def test_a_new_run_has_nothing_to_resume(tmp_path, config, engine):
    assert resume(tmp_path, config, engine, str) is None


# --- what checksums do not show -----------------------------------------------------------------


def rewrite_manifest(folder: Path) -> None:
    """The manifest of a checkpoint whose files were changed by hand: every checksum is right."""
    paths = sorted(path for path in folder.iterdir() if path.name != record.MANIFEST)
    files = tuple(record.FileRecord.of(path) for path in paths)
    record.write_record(folder, dataclasses.replace(record.read_record(folder), files=files))


def test_a_configuration_that_cannot_be_read_again_is_not_whole(run, config, engine, capsys):
    newest = list_checkpoints(run)[-1]
    path = newest / "config.toml"
    text = path.read_text()
    assert "gradient_clipping = 1.0" in text
    # As the JSON of infinity was once written.
    path.write_text(text.replace("gradient_clipping = 1.0", "gradient_clipping = Infinity"))
    rewrite_manifest(newest)
    assert main(["checkpoint", "verify", str(newest)]) == 3
    told = capsys.readouterr().out
    assert f"{path}: not valid TOML" in told and "no run can go on from it" in told
    # It is no damage that another copy would mend: what reads it says so, and sets nothing aside.
    for read in (
        lambda: load_model(run),
        lambda: resume(run, config, engine, fingerprint(run)),
    ):
        with pytest.raises(UsageError, match="config.toml: not valid TOML"):
            read()
    assert list_checkpoints(run)[-1] == newest


def rewrite_slices(folder: Path, change: Callable[[list[Slice]], list[Slice]]) -> None:
    """All slices of a checkpoint in one file, changed."""
    reader = SliceReader(folder)
    whole = [reader.slice(name, 0, reader.numel(name)) for name in reader.names]
    copies = []
    for one in change(whole):
        values = {key: one.read(key).clone() for key in STATES}
        copies.append(dataclasses.replace(one, read=values.__getitem__))
    for path in [*folder.glob("rank_*"), folder / record.INDEX]:
        path.unlink()
    write_slices(folder / "rank_00000.safetensors", copies)
    rewrite_manifest(folder)


def shortened(one: Slice, start: int, numel: int) -> Slice:
    """Elements [start, start + numel) of a whole parameter."""
    return dataclasses.replace(
        one, start=start, numel=numel, read=lambda key: one.read(key)[start : start + numel]
    )


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda every: every, ""),
        (lambda every: every[1:], "parameter 'h.0.attn.c_attn.bias' is in no file"),
        (
            lambda every: [*every, dataclasses.replace(every[0], name="h.9.x")],
            "parameter 'h.9.x' is none of the model's",
        ),
        (
            lambda every: [shortened(every[0], 0, 90), *every[1:]],
            "parameter 'h.0.attn.c_attn.bias' is not there once: element 90 of part 0 is in no f",
        ),
        (
            lambda every: [dataclasses.replace(every[0], shape=(32, 3)), *every[1:]],
            r"parameter 'h.0.attn.c_attn.bias' has shape \(32, 3\), but \(96,\) in the model",
        ),
        (lambda every: every[:3], r"and \d+ parameters more"),
    ],
    ids=["whole", "missing", "foreign", "gap", "shape", "many"],
)
def test_every_parameter_of_the_model_is_there_once(run, config, engine, change, problem, caplog):
    *_, older, newest = list_checkpoints(run)
    rewrite_slices(newest, change)
    problems = verify(newest)
    assert bool(problems) == bool(problem) and re.search(problem, "; ".join(problems))
    if problem:
        assert str(newest) in problems[0] and len(problems) <= 6
        with pytest.raises(DamageError, match=problem):
            load_model(run)
    saved = resume(run, config, engine, fingerprint(run))
    assert saved is not None
    assert saved.step == record.read_record(older if problem else newest).step
    assert re.search(problem, caplog.text)


def test_a_file_of_a_rank_that_is_there_twice(run):
    newest = list_checkpoints(run)[-1]
    shutil.copy(newest / FILES[1], newest / "rank_00002.safetensors")
    rewrite_manifest(newest)
    assert "rank_00002.safetensors: does not hold of" in verify(newest)[0]
    # Without an index the headers tell it.
    (newest / record.INDEX).unlink()
    rewrite_manifest(newest)
    assert re.search(r"is not there once: element \d+ of part 0 is in two files", verify(newest)[0])


# --- what the manifest does not name ------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["rank_00000 (copy).safetensors", "rank_00002.safetensors", "rank_00000.safetensors~"]
)
def test_only_what_the_manifest_names_is_read(run, config, engine, name, capsys, caplog):
    older, newest = list_checkpoints(run)[-2:]
    expected = {key: value.clone() for key, value in load_model(newest)[0].state_dict().items()}
    shutil.copy(older / FILES[0], newest / name)
    # In the place of the manifest's own file it would be damage.
    assert main(["checkpoint", "verify", str(newest)]) == 0
    said = f"{newest.name}  whole; not in its manifest, and read by nothing: {name!r}\n"
    assert capsys.readouterr().out == said
    model, _, _ = load_model(run)
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    reader = SliceReader(newest)
    saved = resume(run, config, engine, fingerprint(run))
    assert saved is not None and saved.step == record.step_of(newest)
    for one in engine.slices():
        assert torch.equal(one.read("fp32"), reader.read(one, "fp32"))
    assert caplog.text.count(f"{newest}: not in its manifest, and not read: {name!r}") == 2


def test_a_manifest_names_files_of_its_own_folder_only(run):
    older, newest = list_checkpoints(run)[-2:]
    path, outside = newest / "manifest.json", f"../{older.name}/rank_00000.safetensors"
    tree = json.loads(path.read_text())
    del tree["sha256"]
    for name in (outside, str(older / FILES[0]), "..", ""):
        tree["files"][0]["name"] = name
        path.write_text(sealed_json(tree))
        assert f"{name!r} is no name of a file in this folder" in verify(newest)[0]


# --- the commands -------------------------------------------------------------------------------


def test_list_and_verify(run, capsys):
    folders = list_checkpoints(run)
    assert main(["checkpoint", "list", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(folders)
    assert lines[0].startswith(folders[0].name) and lines[0].endswith("milestone")
    assert "world 2" in lines[-1] and "tokens" in lines[-1]
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert capsys.readouterr().out.count("whole") == len(folders)
    flip(folders[-1] / "manifest.json")
    flip(folders[0] / "rank_00001.safetensors")
    assert main(["checkpoint", "list", str(run)]) == 0
    assert "damaged" in capsys.readouterr().out.splitlines()[-1]
    assert main(["checkpoint", "verify", str(run)]) == 3
    lines = capsys.readouterr().out.splitlines()
    assert "rank_00001.safetensors: its checksum is not the manifest's" in lines[0]
    assert "whole" in lines[1] and "manifest.json: not a readable manifest" in lines[-1]
    assert main(["checkpoint", "verify", str(folders[1])]) == 0


@pytest.mark.parametrize("action", ["list", "verify", "consolidate"])
def test_no_checkpoint_is_exit_code_2(tmp_path, capsys, action):
    arguments = [str(tmp_path / "out")] if action == "consolidate" else []
    assert main(["checkpoint", action, str(tmp_path), *arguments]) == 2
    assert "no checkpoint here" in capsys.readouterr().err


def test_the_package_offers_what_others_use():
    assert all(hasattr(checkpoint, name) for name in checkpoint.__all__)
