"""A run's checkpoints: damage of any file is found, the older one is loaded, nothing is lost."""

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megagpt import checkpoint
from megagpt.checkpoint import (
    CheckpointRecord,
    Saver,
    list_checkpoints,
    load_model,
    record,
    resume,
    verify,
)
from megagpt.checkpoint.export import consolidate
from megagpt.checkpoint.load import differences
from megagpt.checkpoint.slice_file import SliceReader
from megagpt.cli import main
from megagpt.config import RunConfig, load_run
from megagpt.engine import Engine, Ranks, build_engine
from megagpt.errors import DamageError, UsageError
from megagpt.plan.ds_config import read_ds_config, resolve
from megagpt.plan.layout import Layout
from tests.lib.distributed import group_of_one, undisturbed

FILES = ("rank_00000.safetensors", "rank_00001.safetensors", "config.toml", "manifest.json")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with the checkpoints of a run by two ranks, to be damaged at will."""
    shutil.copytree(undisturbed() / "run" / "checkpoints", tmp_path / "run" / "checkpoints")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load_run(undisturbed() / "run.toml")


@pytest.fixture(scope="module")
def engine(config: RunConfig) -> Iterator[Engine]:
    """A real engine of one process, with DeepSpeed."""
    ds_config = resolve(config, Layout(), read_ds_config("zero1"))
    with group_of_one():
        made = build_engine(config, Layout(), Ranks(), ds_config)
        yield made
        made.close()


def fingerprint(run: Path) -> Callable[[int], str]:
    found = record.read_record(list_checkpoints(run)[0]).data["fingerprint"]
    return lambda samples: found


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
    assert [f.name for f in state.files] == [*FILES[:2], "config.toml"]


def test_bytes_on_the_disk_are_the_owned_slices_and_no_more(config):
    folder = list_checkpoints(undisturbed() / "run")[-1]
    reader = SliceReader(folder)
    numbers = sum(reader.numel(name) for name in reader.names)
    size = sum(f.stat().st_size for f in folder.glob("rank_*"))
    # fp32 weights and two moments; the rest is two headers.
    assert 12 * numbers < size < 12 * numbers + 40_000


# --- damage -------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 1
    path.write_bytes(data)


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
    (run / "checkpoints" / "latest.tmp").write_text("half")
    saved = resume(run, config, engine, fingerprint(run))
    assert saved is not None and list_checkpoints(run) == folders
    assert not list((run / "checkpoints").glob("*.tmp"))
    assert "step_00000099.tmp, which was never finished" in caplog.text


def test_a_new_run_has_nothing_to_resume(tmp_path, config, engine):
    assert resume(tmp_path, config, engine, str) is None


# --- is it the same run? ------------------------------------------------------------------------


def test_another_run_is_refused_and_may_be_allowed(run, config, engine, caplog):
    other = dataclasses.replace(
        config, seed=2, schedule=dataclasses.replace(config.schedule, peak_lr=1e-3)
    )
    with pytest.raises(UsageError) as caught:
        resume(run, other, engine, str)
    lines = str(caught.value).splitlines()
    assert "was saved by another run (saved -> asked):" in lines[0]
    assert lines[1:4] == [
        "  - seed: 1 -> 2",
        "  - schedule.peak_lr: 0.003 -> 0.001",
        "  - data: other shards or weights than the checkpoint was trained on",
    ]
    assert "--allow-changes" in lines[4]
    assert resume(run, other, engine, str, allow_changes=True) is not None
    assert "the run goes on changed" in caplog.text


def test_what_only_changes_speed_is_no_difference(config):
    other = dataclasses.replace(
        config,
        parallel=dataclasses.replace(config.parallel, ds_config="zero3", micro_batch=1),
        checkpoint=dataclasses.replace(config.checkpoint, keep_last=9),
        output="elsewhere",
    )
    assert differences(config, other) == []


def test_another_model_is_never_loaded(run, config, engine):
    small = dataclasses.replace(config, model=dataclasses.replace(config.model, d_model=16))
    made = build_engine(small, Layout(), Ranks(), resolve(small, Layout(), read_ds_config("zero1")))
    with pytest.raises(UsageError, match="has shape .* opens only with the .model. it was trained"):
        resume(run, small, made, fingerprint(run), allow_changes=True)
    made.close()


# --- saving -------------------------------------------------------------------------------------


def state(step: int, like: CheckpointRecord, milestone: bool = False) -> CheckpointRecord:
    return dataclasses.replace(like, step=step, tokens=step * 512, milestone=milestone, files=())


def test_save_then_load_is_exact_and_old_ones_go(tmp_path, run, config, engine):
    like = resume(run, config, engine, fingerprint(run))
    saver = Saver(tmp_path / "new", config, engine)
    assert saver.finish() is None and not saver.busy
    for step, milestone in ((1, False), (2, True), (3, False), (4, False), (5, False), (6, False)):
        saver.begin(state(step, like, milestone))
        assert saver.busy
    folder = saver.finish()
    assert folder is not None and not saver.busy and saver.stall_s > 0
    names = [f.name[-1] for f in list_checkpoints(tmp_path / "new")]
    assert names == ["2", "4", "5", "6"]
    assert verify(folder) == []
    one, other = SliceReader(folder), SliceReader(list_checkpoints(run)[-1])
    for name in other.names:
        assert torch.equal(one.full(name, "exp_avg"), other.full(name, "exp_avg"))
    # The same step again: the folder that was there is set aside, never overwritten.
    saver.begin(state(6, like))
    assert saver.finish() == folder
    assert folder.with_name(folder.name + ".damaged1").is_dir()


def test_an_old_checkpoint_that_rotted_does_not_stop_the_run(tmp_path, run, config, engine):
    like = resume(run, config, engine, fingerprint(run))
    saver = Saver(tmp_path / "new", config, engine)
    for step in (1, 2, 3, 4, 5):
        saver.begin(state(step, like))
        folder = saver.finish()
        assert folder is not None
        if step == 1:
            flip(folder / "manifest.json")
    # It may be a milestone that can be restored: it stays.
    names = [f.name[-1] for f in list_checkpoints(tmp_path / "new")]
    assert names == ["1", "3", "4", "5"]


def failing(config: RunConfig, on_failure: str) -> RunConfig:
    changed = dataclasses.replace(config.checkpoint, on_failure=on_failure)
    return dataclasses.replace(config, checkpoint=changed)


def test_a_folder_that_cannot_be_made_is_no_checkpoint(tmp_path, run, config, engine, caplog):
    like = resume(run, config, engine, fingerprint(run))
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "checkpoints").write_text("a file where the folder should be")
    saver = Saver(tmp_path / "new", failing(config, "stop"), engine)
    saver.begin(state(1, like))
    with pytest.raises(DamageError, match="checkpoint not saved: .*make space and run again"):
        saver.finish()
    saver = Saver(tmp_path / "new", failing(config, "continue"), engine)
    saver.begin(state(2, like))
    assert saver.finish() is None
    assert "training goes on" in caplog.text
    # The last one of a process: there is no training left that could go on.
    saver.begin(state(3, like))
    with pytest.raises(DamageError, match="checkpoint not saved"):
        saver.finish(last=True)


def test_999_damaged_copies_are_enough(tmp_path):
    folder = tmp_path / "step_00000001"
    folder.mkdir()
    for number in range(1, 1000):
        folder.with_name(f"{folder.name}.damaged{number}").mkdir()
    with pytest.raises(DamageError, match="999 damaged copies are there already; remove them"):
        record.set_aside(folder)


# --- the commands and the readers downstream ------------------------------------------------------


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
    assert main(command) == 2
    assert "not empty; give a folder that does not exist yet" in capsys.readouterr().err


def test_a_consolidation_that_was_killed_leaves_nothing_behind(run, tmp_path):
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "model-00007-of-00009.safetensors").write_text("half")
    (tmp_path / "out").mkdir()
    found = [path.name for path in consolidate(run, tmp_path / "out")]
    assert found == [
        "config.toml",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
    ]


def test_load_model_opens_one_checkpoint_of_a_run_too(run):
    first = list_checkpoints(run)[0]
    _, _, facts = load_model(first)
    assert facts["checkpoint"] == first


def test_the_room_offers_what_others_use():
    assert all(hasattr(checkpoint, name) for name in checkpoint.__all__)
