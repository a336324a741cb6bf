"""Saving: copies that training does not change, one rename that counts, disks that refuse."""

import dataclasses
import shutil
import threading

import pytest
import torch

from megagpt.checkpoint import Saver, list_checkpoints, record, resume, verify
from megagpt.checkpoint.save import HostBuffer, copied_apart
from megagpt.checkpoint.slice_file import SliceReader
from megagpt.config import RunConfig
from megagpt.engine.slices import STATES, Slice, TensorShare
from megagpt.errors import DamageError
from tests.lib.checkpoints import fingerprint, flip, state


def test_save_then_load_is_exact_and_old_ones_go(tmp_path, run, config, engine):
    like = resume(run, config, engine, fingerprint(run))
    saver = Saver(tmp_path / "new", config, engine)
    assert saver.finish() is None and not saver.busy
    for step, milestone in ((1, False), (2, True), (3, False), (4, False), (5, False), (6, False)):
        saver.begin(state(step, like, milestone))
        assert saver.busy
    folder = saver.finish()
    assert folder is not None and not saver.busy and saver.stall_s > 0
    saver.settle()
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
    saver.settle()
    # It may be a milestone that can be restored: it stays.
    names = [f.name[-1] for f in list_checkpoints(tmp_path / "new")]
    assert names == ["1", "3", "4", "5"]


def test_neither_training_nor_a_stop_waits_for_the_removal_of_older_checkpoints(
    tmp_path, run, config, engine, monkeypatch
):
    like = resume(run, config, engine, fingerprint(run))
    saver = Saver(tmp_path / "new", config, engine)
    slow, remove = threading.Event(), shutil.rmtree
    for step in range(1, 6):
        if step == 4:
            monkeypatch.setattr(
                shutil, "rmtree", lambda path, **how: (slow.wait(60), remove(path, **how))
            )
        saver.begin(state(step, like))
        folder = saver.finish(last=step == 5)
    assert folder is not None and verify(folder) == []
    first = record.folder_of(tmp_path / "new") / record.name_of(1)
    assert not slow.is_set() and not first.exists() and record.unfinished_of(first).exists()
    slow.set()
    saver.settle()
    assert not list(first.parent.glob("*.tmp"))
    assert [f.name[-1] for f in list_checkpoints(tmp_path / "new")] == ["3", "4", "5"]


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


# --- host memory that is kept -------------------------------------------------------------------


def slices(tensors: dict[str, torch.Tensor]) -> list[Slice]:
    """Each tensor as a slice; its moments are its double and its triple."""

    def one(name: str, tensor: torch.Tensor) -> Slice:
        return Slice(
            name=name,
            shape=tuple(tensor.shape),
            split=TensorShare(),
            start=0,
            numel=tensor.numel(),
            owned=True,
            read=lambda key: tensor.view(-1) * (1 + STATES.index(key)),
            write=lambda key, value: None,
        )

    return [one(name, tensor) for name, tensor in tensors.items()]


def tensors_on(device: str) -> dict[str, torch.Tensor]:
    sizes = {"a": (3, 5), "b": (7,), "c": (2, 2), "d": (1,)}
    return {name: torch.randn(size, device=device) for name, size in sizes.items()}


def assert_copied(buffer: HostBuffer, tensors: dict[str, torch.Tensor]) -> None:
    """What is copied stays as it was while training goes on."""
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    copies = buffer.copied(slices(tensors))
    for tensor in tensors.values():
        tensor.zero_()
    assert [one.name for one in copies] == list(tensors)
    for one in copies:
        for number, key in enumerate(STATES, 1):
            values = one.read(key)
            assert values.device.type == "cpu" and values.dtype == torch.float32
            assert torch.equal(values, (before[one.name].view(-1) * number).float().cpu())


# 81 elements in one block, in blocks that tensors end with, cross and span.
@pytest.mark.parametrize("block", [1 << 28, 64, 16, 4])
def test_the_buffer_holds_what_was_there(block):
    buffer = HostBuffer(pinned=False, block=block)
    assert_copied(buffer, tensors_on("cpu"))
    memory = [tensor.data_ptr() for tensor in buffer._blocks]
    assert_copied(buffer, tensors_on("cpu"))
    assert [tensor.data_ptr() for tensor in buffer._blocks] == memory
    assert sum(len(tensor) for tensor in buffer._blocks) == 81
    # Of more slices than before: it grows.
    assert_copied(buffer, {**tensors_on("cpu"), "e": torch.randn(10, 10)})
    assert HostBuffer(pinned=False).copied([]) == []


def test_bf16_is_copied_in_fp32():
    tensors = {"a": torch.randn(5).bfloat16()}
    assert_copied(HostBuffer(pinned=False), tensors)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is pinned memory")
def test_memory_that_cannot_be_pinned_is_taken_as_it_is(caplog):
    assert_copied(HostBuffer(pinned=True), tensors_on("cpu"))
    assert "checkpoints take longer: no pinned memory (" in caplog.text


def test_the_buffer_saves_what_separate_copies_save(tmp_path, run, config, engine, monkeypatch):
    like = resume(run, config, engine, fingerprint(run))
    folders = []
    for number, copied in enumerate((copied_apart, HostBuffer(pinned=False, block=4096).copied)):
        saver = Saver(tmp_path / str(number), config, engine)
        monkeypatch.setattr(saver, "_copied", copied)
        for step in (1, 2):
            saver.begin(state(step, like))
            folders.append(saver.finish())
    contents = {(folder / "rank_00000.safetensors").read_bytes() for folder in folders}
    assert len(contents) == 1 and verify(folders[-1]) == []


@pytest.mark.gpu
def test_a_gpu_copies_into_memory_that_is_pinned_once(tmp_path, run, config, engine):
    buffer = HostBuffer(pinned=True, block=16)
    assert_copied(buffer, tensors_on("cuda"))
    assert all(tensor.is_pinned() for tensor in buffer._blocks)
    # Many more elements than a copy could have done before the tensors are set to zero.
    large = {"a": torch.randn(1 << 26, device="cuda")}
    assert_copied(HostBuffer(pinned=True), large)
    # An engine on the GPU saves through it, twice into the same memory.
    like = resume(run, config, engine, fingerprint(run))
    saver = Saver(tmp_path / "new", config, engine)
    memory = []
    for step in (1, 2):
        saver.begin(state(step, like))
        folder = saver.finish()
        assert folder is not None and verify(folder) == []
        reader = SliceReader(folder)
        for one in engine.slices():
            for key in STATES:
                assert torch.equal(reader.read(one, key), one.read(key).cpu())
        memory.append([tensor.data_ptr() for tensor in saver._copied.__self__._blocks])
    assert memory[0] == memory[1]
