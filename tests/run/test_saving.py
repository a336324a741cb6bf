"""What is saved, what is kept, and how a run ends that has nothing to save any more."""

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megagpt.checkpoint import list_checkpoints, verify
from megagpt.checkpoint.record import read_record, write_record
from megagpt.cli import main
from megagpt.config import load_run
from megagpt.errors import DamageError, Stopped, UnsoundError
from megagpt.log import read_metrics
from megagpt.loop import Trainer
from tests.lib.corpus import run_file
from tests.lib.distributed import digest_of_checkpoint, group_of_one, steps
from tests.lib.here import train_here

SHORT: dict[str, dict[str, object]] = {
    "schedule": {"total_tokens": 12 * 256, "warmup_tokens": 0, "batch_tokens": 256}
    | {"ramp_start_tokens": 0, "ramp_tokens": 0},
    "checkpoint": {"every_tokens": 2 * 256, "keep_last": 2},
    "evaluate": {"every_tokens": 0, "batches": 1},
    "log": {"tensorboard": False, "every_steps": 1_000_000},
}
"""Twelve steps of 256 tokens, saved at each second one."""


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    with group_of_one():
        yield


def names(root: Path) -> list[int]:
    return [read_record(folder).step for folder in list_checkpoints(root / "run")]


def digests(root: Path) -> dict[int, str]:
    return {read_record(f).step: digest_of_checkpoint(f) for f in list_checkpoints(root / "run")}


def spoil(trainer: Trainer, key: str = "fp32", value: float = math.nan) -> None:
    """One element of the weights or moments goes wrong."""
    piece = next(p for p in trainer.engine.slices() if p.name == "h.1.mlp.c_fc.weight")
    values = piece.read(key).detach().clone()
    values[77] = value
    piece.write(key, values)


def test_checkpoints_that_cannot_be_listed_are_not_none(tmp_path, capsys):
    """A run would begin anew, and write its record from step 0."""
    file = run_file(tmp_path, **SHORT)
    train_here(file)
    there = tmp_path / "run" / "checkpoints"
    lines = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    there.rename(tmp_path / "aside")
    there.symlink_to("checkpoints")  # unreadable for root, too
    with pytest.raises(OSError, match="levels of symbolic links: .*run/checkpoints"):
        train_here(file)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == lines
    assert main(["checkpoint", "list", str(tmp_path / "run")]) == 1
    assert "run/checkpoints: Too many levels" in capsys.readouterr().err


# --- what is not sound --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ds_config",
    [
        pytest.param("zero0", marks=pytest.mark.slow),
        "zero1",
        pytest.param("zero2", marks=pytest.mark.slow),
        "zero3",
    ],
)
def test_a_nan_is_never_saved_and_the_next_start_goes_on(tmp_path, ds_config):
    file = run_file(tmp_path, **SHORT, parallel={"ds_config": ds_config})
    train_here(file)
    calm = digests(tmp_path)
    shutil.rmtree(tmp_path / "run")

    def at_6(trainer: Trainer, step: int) -> None:
        if step == 6:
            spoil(trainer)

    with pytest.raises(UnsoundError) as error:
        train_here(file, after=at_6)
    assert error.value.exit_code == 4
    for words in (
        "after step 6 weights or moments are what no training makes of them:\n"
        "  - rank 0: h.1.mlp.c_fc.weight: a weight is nan\n",
        "nothing of it was saved: run again to go on from the checkpoint before",
        "lower schedule.peak_lr",
    ):
        assert words in str(error.value)
    assert names(tmp_path) == [2, 4]
    train_here(file)
    assert digests(tmp_path) == calm


def test_starts_of_a_run_that_makes_no_update_keep_what_was_good(tmp_path):
    limit = "optimizer.max_skipped_steps=3"
    file = run_file(tmp_path, **SHORT)
    with pytest.raises(Stopped):
        train_here(file, limit, "checkpoint.stop_after_steps=4")
    good = digests(tmp_path)
    assert list(good) == [2, 4]

    def always(trainer: Trainer, step: int) -> None:
        spoil(trainer, value=1e38)

    for _ in range(3):
        with pytest.raises(UnsoundError):
            train_here(file, limit, after=always)
        assert digests(tmp_path) == good


def without_updates(trainer: Trainer) -> None:
    """From now on every gradient is infinite once one update was made."""

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * (math.inf if trainer.engine.optimizer_state().updates else 1.0)

    trainer.engine.layers()["ln_f"].weight.register_hook(hook)


def test_a_run_in_portions_that_makes_no_update_ends_too(tmp_path):
    sections = {"optimizer": {"max_skipped_steps": 5}, "parallel": {"ds_config": "zero0"}}
    file = run_file(tmp_path, **SHORT, **sections)
    ends = []
    for _ in range(5):
        with pytest.raises((Stopped, UnsoundError)) as error:
            train_here(file, "checkpoint.stop_after_steps=2", before=without_updates)
        ends.append(error.value.exit_code)
    # Step 1 updates, 2 to 6 do not: counted over the starts, and never 75 again.
    assert ends == [75, 75, 4, 4, 4]
    assert "step 6, not saved: 5 steps in a row left the weights as they were" in str(error.value)
    # The stops were saved, and what they could go back to was not retired for them.
    assert names(tmp_path) == [2, 4]
    assert {read_record(f).updates for f in list_checkpoints(tmp_path / "run")} == {1}


def test_a_run_shorter_than_the_limit_is_not_complete_without_an_update(tmp_path):
    def endless(trainer: Trainer) -> None:
        weight = trainer.engine.layers()["ln_f"].weight
        weight.register_hook(lambda gradient: gradient * math.inf)

    file = run_file(tmp_path, **SHORT, parallel={"ds_config": "zero0"})
    with pytest.raises(UnsoundError, match="step 12, not saved: 12 steps in a row left"):
        train_here(file, before=endless)
    assert names(tmp_path) == []


def test_a_run_that_ends_without_a_loss_is_not_complete(tmp_path):
    """Weights are wild, but finite; fewer steps are left out for it than end a run."""
    file = run_file(tmp_path, **SHORT)
    train_here(file, "schedule.total_tokens=1024")
    good = digests(tmp_path)
    wild = ["schedule.total_tokens=1792", "schedule.peak_lr=1e30"]
    said = "step 7, the last, not saved: its loss and its validation loss are not finite; lower sch"
    for _ in range(2):
        with pytest.raises(UnsoundError, match=said) as error:
            train_here(file, *wild, allow_changes=True)
        assert error.value.exit_code == 4
        assert digests(tmp_path) == good and list(good) == [2, 4]
    train_here(file, "schedule.total_tokens=1792", allow_changes=True)
    assert names(tmp_path) == [6, 7]


def test_nor_is_one_whose_last_update_leaves_no_loss(tmp_path):
    short = ["schedule.total_tokens=256", "schedule.peak_lr=1e30"]
    with pytest.raises(UnsoundError, match="step 1, the last, not saved: its validation loss is"):
        train_here(run_file(tmp_path, **SHORT), *short)
    assert names(tmp_path) == []


def test_a_checkpoint_that_an_earlier_version_saved_unseen_is_passed_over(tmp_path, caplog):
    file = run_file(tmp_path, **SHORT)
    train_here(file)
    calm = digests(tmp_path)
    # As it was before states were looked at: everything is saved.
    longer = ["checkpoint.keep_last=3", "schedule.total_tokens=3584"]

    def unseen(trainer: Trainer, step: int) -> None:
        if step == 14:
            spoil(trainer, "exp_avg", math.inf)
            trainer.soundness.look = list

    train_here(file, *longer, allow_changes=True, after=unseen)
    assert names(tmp_path) == [10, 12, 14]
    train_here(file, *longer, allow_changes=True)
    assert "not sound, set aside as" in caplog.text
    assert "rank 0: h.1.mlp.c_fc.weight: a first moment is inf" in caplog.text
    assert names(tmp_path) == [10, 12, 14] and calm.items() <= digests(tmp_path).items()
    assert verify(list_checkpoints(tmp_path / "run")[-1]) == []
    # Where it is the only one it stays, and nothing is trained over it.
    for folder in list_checkpoints(tmp_path / "run"):
        shutil.rmtree(folder)
    (bad,) = (tmp_path / "run" / "checkpoints").glob("step_*14.damaged1")
    bad.rename(bad.with_suffix(""))
    with pytest.raises(
        DamageError, match=r"step_00000014: weights or moments are what no training"
    ):
        train_here(file, *longer)
    assert names(tmp_path) == [14]


# --- what is kept -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "keep", "kept"),
    [
        # 1000 tokens lie in step 4, 2000 in 8, 3000 in 12; 700 in 3, 1400 in 6, 2100 in 9, ...
        (512, 1000, [4, 8, 12]),
        (768, 1000, [6, 9, 12]),
        (512, 700, [4, 6, 10, 12]),
        # The stop at step 7 is a checkpoint like any other.
        (1280, 256, [5, 7, 10, 12]),
    ],
)
def test_the_first_checkpoint_past_each_multiple_is_kept(tmp_path, every, keep, kept):
    due = {"every_tokens": every, "keep_last": 1, "keep_every_tokens": keep}
    file = run_file(tmp_path, **SHORT | {"checkpoint": due})
    with pytest.raises(Stopped):
        train_here(file, "checkpoint.stop_after_steps=7")
    train_here(file)
    found = map(read_record, list_checkpoints(tmp_path / "run"))
    assert [saved.step for saved in found if saved.milestone] == kept


# --- what a run was -----------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [512, 128])
def test_another_batch_on_resume_goes_on_and_remembers(tmp_path, batch, capsys):
    increment = "schedule.ramp_increment_tokens=128"
    file = run_file(tmp_path, **SHORT)
    with pytest.raises(Stopped):
        train_here(file, increment, "checkpoint.stop_after_steps=5")
    other = [increment, f"schedule.batch_tokens={batch}", f"schedule.ramp_start_tokens={batch}"]
    with pytest.raises(Stopped):
        train_here(file, *other, "checkpoint.stop_after_steps=2", allow_changes=True)
    # Weeks later, without a change, and from a checkpoint that does not say what it read last.
    newest = list_checkpoints(tmp_path / "run")[-1]
    saved = read_record(newest)
    data = {key: value for key, value in saved.data.items() if key != "latest"}
    if batch == 512:
        write_record(newest, dataclasses.replace(saved, data=data))
    with pytest.raises(Stopped):
        train_here(file, *other, "checkpoint.stop_after_steps=1")
    train_here(file, *other)
    records = steps(tmp_path / "run")
    assert [r["batch_tokens"] for r in records[:5]] == [256] * 5
    assert {r["batch_tokens"] for r in records[5:]} == {batch}
    assert 12 * 256 <= records[-1]["tokens"] < 12 * 256 + batch
    # Each step's samples follow those before it, and are the ones that its digest names.
    for before, after in zip([{"samples": 0}, *records], records, strict=False):
        assert after["samples"] - before["samples"] == after["batch_tokens"] // 32
    capsys.readouterr()
    for record in records:
        code = main(["data", "batch", str(tmp_path / "run"), "--step", str(record["step"])])
        assert code == 0
        assert f"digest {record['digest']} (as recorded by the run)" in capsys.readouterr().out


def test_steps_ahead_of_a_changed_run_are_counted_from_where_it_is(tmp_path, capsys):
    file = run_file(tmp_path, **SHORT)
    increment = "schedule.ramp_increment_tokens=128"
    with pytest.raises(Stopped):
        train_here(file, increment, "checkpoint.stop_after_steps=5")
    other = [increment, "schedule.batch_tokens=512", "schedule.ramp_start_tokens=512"]
    with pytest.raises(Stopped):
        train_here(file, *other, "checkpoint.stop_after_steps=1", allow_changes=True)
    seen = []
    for step in (7, 8):
        assert main(["data", "batch", str(tmp_path / "run"), "--step", str(step)]) == 0
        seen.append(capsys.readouterr().out.partition("digest ")[2][:16])
    train_here(file, *other)
    records = steps(tmp_path / "run")
    assert [r["digest"][:16] for r in records[6:]][:2] == seen[: len(records) - 6]
    last = records[-1]["step"]
    # The schedule alone, from its beginning, would take 30.
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["steps"] == last != load_run(file, other).schedule.n_steps
    assert main(["data", "batch", str(tmp_path / "run"), "--step", str(last + 1)]) == 2
    assert f"--step {last + 1}: the run has the steps 1 to {last}" in capsys.readouterr().err


# --- the folder ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["moved", "removed"])
def test_a_folder_that_goes_away_under_the_run(tmp_path, caplog, how):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"

    def away(trainer: Trainer, step: int) -> None:
        if step == 7:
            trainer.finish_saving()
            trainer.checkpoints.saver.settle()
            run.rename(elsewhere) if how == "moved" else shutil.rmtree(run)

    file = run_file(tmp_path, **SHORT)
    train_here(file, after=away)
    assert f"{run}, or the record in it, was moved, replaced or removed under" in caplog.text
    assert [r["step"] for r in read_metrics(run) if "loss" in r] == list(range(7, 13))
    (event,) = [r for r in read_metrics(run) if r.get("event") == "resume"]
    assert event["missing_steps"] == "1-6"
    assert names(tmp_path) == [10, 12] and json.loads((run / "run.json").read_text())
    if how == "moved":
        assert len(steps(elsewhere)) == 6 and len(list_checkpoints(elsewhere)) == 2
