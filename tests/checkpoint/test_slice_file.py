"""Files of slices: any cut into ranks reads back to the same tensors, under any other cut."""

import hashlib
import json
import os
import resource
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from megagpt.checkpoint.slice_file import FileRecord, fit_rows, write_slices
from megagpt.engine import split as splits
from megagpt.engine.slices import STATES, Slice, TensorShare
from megagpt.errors import DamageError, UsageError
from tests.lib.checkpoints import opened

Whole = dict[str, dict[str, Tensor]]
"""key -> name -> tensor."""


def piece(
    whole: dict[str, Tensor],
    name: str,
    start: int,
    stop: int,
    split: TensorShare,
    owned: bool = True,
) -> Slice:
    """Elements [start, stop) of a part of the parameter; `whole` has its tensor by key."""
    parts = {k: splits.take(t, split.kind, split.part, split.parts) for k, t in whole.items()}
    return Slice(
        name=name,
        shape=tuple(parts["fp32"].shape),
        split=split,
        start=start,
        numel=stop - start,
        owned=owned,
        read=lambda key: parts[key].reshape(-1)[start:stop],
        write=lambda key, value: None,
    )


def tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, dict[str, Tensor]]:
    """name -> key -> random values."""
    draw = torch.Generator().manual_seed(0)
    return {n: {k: torch.randn(s, generator=draw) for k in STATES} for n, s in shapes.items()}


def cut(whole: dict[str, dict[str, Tensor]], ranks: int, kinds: dict, parts: int, draw) -> list:
    """Slices of each rank: `parts` tensor ranks, each cut at random points over `ranks` ranks."""
    held: list[list[Slice]] = [[] for _ in range(ranks * parts)]
    for name, values in whole.items():
        for part in range(parts if kinds[name] != "whole" else 1):
            split = TensorShare(
                kind=kinds[name], part=part, parts=parts if kinds[name] != "whole" else 1
            )
            size = values["fp32"].numel() // split.parts
            points = sorted(draw(st.integers(0, size)) for _ in range(ranks - 1))
            for rank, (a, b) in enumerate(zip([0, *points], [*points, size], strict=True)):
                if a < b:
                    held[rank * parts + part].append(piece(values, name, a, b, split))
    return held


def write(folder: Path, held: list[list[Slice]]) -> list[FileRecord]:
    folder.mkdir(exist_ok=True)
    return [
        write_slices(folder / f"rank_{rank:05d}.safetensors", own) for rank, own in enumerate(held)
    ]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_cut_reads_back_under_any_other(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cut")
    shapes = {"a": (12, 5), "b": (24,), "c": (7,), "d": (4, 12), "e": (6, 4)}
    kinds = {"a": "column", "b": "qkv", "c": "whole", "d": "row", "e": "qkv"}
    whole = tensors(shapes)
    ranks, parts = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([1, 2]))
    write(folder, cut(whole, ranks, kinds, parts, data.draw))
    reader = opened(folder)
    assert reader.names == sorted(shapes)
    for name, values in whole.items():
        assert reader.numel(name) == values["fp32"].numel()
        for key in STATES:
            assert torch.equal(reader.full(name, key), values[key])
    ranks, parts = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([1, 2]))
    for own in cut(whole, ranks, kinds, parts, data.draw):
        for one in own:
            for key in STATES:
                assert torch.equal(reader.read(one, key), one.read(key))


def test_the_files_open_with_safetensors_itself(tmp_path):
    whole = tensors({"h.0.x": (3, 5), "wte.weight": (7, 2)})
    split = TensorShare()
    own = [piece(values, name, 1, 6, split) for name, values in whole.items()]
    copy = piece(whole["h.0.x"], "copy", 0, 15, split, owned=False)
    (record,) = write(tmp_path / "x", [[*own, copy]])
    path = tmp_path / "x" / record.name
    opened = load_file(path)
    assert sorted(opened) == sorted(f"{n}|{k}" for n in whole for k in STATES)
    for name, values in whole.items():
        for key in STATES:
            assert torch.equal(opened[f"{name}|{key}"], values[key].reshape(-1)[1:6])
    assert record.bytes == path.stat().st_size
    assert record.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_rank_without_slices_writes_a_file_all_the_same(tmp_path):
    values = tensors({"x": (4,)})
    write(tmp_path / "x", [[piece(values["x"], "x", 0, 4, TensorShare())], []])
    assert load_file(tmp_path / "x" / "rank_00001.safetensors") == {}
    assert torch.equal(opened(tmp_path / "x").full("x"), values["x"]["fp32"])


def test_bf16_slices_are_written_in_fp32(tmp_path):
    values = {"x": {k: torch.ones(4, dtype=torch.bfloat16) for k in STATES}}
    write(tmp_path / "x", [[piece(values["x"], "x", 0, 4, TensorShare())]])
    assert opened(tmp_path / "x").full("x").dtype == torch.float32


@pytest.mark.parametrize(
    "cuts", [[(0, 3)], [(3, 10)], [(0, 4), (5, 10)], [(0, 6), (3, 8), (9, 10)]]
)
def test_a_gap_is_found_even_where_an_overlap_makes_up_for_it(tmp_path, cuts):
    values = tensors({"x": (10,)})["x"]
    write(tmp_path / "x", [[piece(values, "x", a, b, TensorShare())] for a, b in cuts])
    with pytest.raises(DamageError, match=r"parameter 'x' \(fp32\) is not whole: element \d+ of"):
        opened(tmp_path / "x").full("x")


def test_replicas_that_overlap_are_read_once(tmp_path):
    values = tensors({"x": (10,)})["x"]
    write(
        tmp_path / "x",
        [[piece(values, "x", a, b, TensorShare())] for a, b in ((0, 7), (2, 5), (4, 10))],
    )
    assert torch.equal(opened(tmp_path / "x").full("x"), values["fp32"])


def test_what_is_no_file_of_slices(tmp_path):
    with pytest.raises(DamageError, match=r"manifest names no rank_\*.safetensors; use another"):
        opened(tmp_path)
    path = tmp_path / "rank_00000.safetensors"
    values = tensors({"x": (10,)})["x"]
    write_slices(path, [piece(values, "x", 0, 10, TensorShare())])
    whole = path.read_bytes()
    head = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    for content in (
        b"",
        whole[:-1],
        whole[:20],
        b"\xff" * 8 + whole[8:],
        len(head).to_bytes(8, "little") + head + b"\0" * 4,
    ):
        path.write_bytes(content)
        with pytest.raises(DamageError, match="rank_00000.safetensors: not a readable file of sl"):
            opened(tmp_path)


def test_headers_that_contradict_themselves_or_each_other(tmp_path):
    path = tmp_path / "rank_00000.safetensors"
    values = tensors({"x": (10,)})["x"]
    write_slices(path, [piece(values, "x", 0, 10, TensorShare())])
    whole = path.read_bytes()
    # The header says 9 elements, and 40 bytes of them.
    path.write_bytes(whole.replace(b'\\"numel\\": 10', b'\\"numel\\": 9 '))
    with pytest.raises(DamageError, match=r"x\|fp32 has 40 bytes, not 4 an element"):
        opened(tmp_path)
    path.write_bytes(whole)
    other = piece(tensors({"x": (5, 2)})["x"], "x", 0, 10, TensorShare())
    write_slices(tmp_path / "rank_00001.safetensors", [other])
    message = "rank_00001.safetensors: .*x has another shape or split than in another rank's file"
    with pytest.raises(DamageError, match=message):
        opened(tmp_path)


def test_a_file_that_is_cut_while_it_is_read(tmp_path):
    values = tensors({"x": (10_000,)})["x"]
    write(tmp_path / "x", [[piece(values, "x", 0, 10_000, TensorShare())]])
    path = tmp_path / "x" / "rank_00000.safetensors"
    reader = opened(path.parent)
    os.truncate(path, path.stat().st_size - 1)
    assert torch.equal(reader.full("x", "exp_avg"), values["exp_avg"])
    with pytest.raises(DamageError, match="rank_00000.safetensors: has become shorter since it"):
        reader.full("x", "exp_avg_sq")


def test_a_parameter_of_another_model(tmp_path):
    values = tensors({"x": (10,)})["x"]
    write(tmp_path / "x", [[piece(values, "x", 0, 10, TensorShare())]])
    reader = opened(tmp_path / "x")
    with pytest.raises(DamageError, match="holds no parameter 'y'; it belongs to another model"):
        reader.full("y")
    longer = piece(tensors({"x": (12,)})["x"], "x", 0, 12, TensorShare())
    with pytest.raises(UsageError, match=r"'x' has shape \(10,\) in the checkpoint, but \(12,\)"):
        reader.read(longer, "fp32")


def test_only_the_embeddings_padding_may_differ(tmp_path):
    values = tensors({"wte.weight": (5, 2)})["wte.weight"]
    padded = {k: fit_rows(v, (8, 2), "wte.weight") for k, v in values.items()}
    assert torch.equal(padded["fp32"][:5], values["fp32"]) and not padded["fp32"][5:].any()
    # Saved by two tensor ranks that padded to 8 rows, read by one process that pads to 6.
    held = [
        [piece(padded, "wte.weight", 0, 8, TensorShare(kind="column", part=part, parts=2))]
        for part in range(2)
    ]
    write(tmp_path / "x", held)
    reader = opened(tmp_path / "x")
    asked = {k: fit_rows(v, (6, 2), "wte.weight") for k, v in values.items()}
    one = piece(asked, "wte.weight", 3, 12, TensorShare())
    assert torch.equal(reader.read(one, "exp_avg"), one.read("exp_avg"))
    with pytest.raises(UsageError, match="'wpe.weight' has shape"):
        fit_rows(values["fp32"], (6, 2), "wpe.weight")
    with pytest.raises(UsageError, match="opens only with the .model. it was trained with"):
        fit_rows(values["fp32"], (5, 3), "wte.weight")


def test_a_checkpoint_of_more_files_than_a_process_may_open(tmp_path):
    whole = tensors({"a": (400, 3)})
    write(tmp_path, [[piece(whole["a"], "a", 3 * i, 3 * i + 3, TensorShare())] for i in range(400)])
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    there = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (there + 50, limits[1]))
    try:
        reader = opened(tmp_path)
        assert reader.problems({"a": (400, 3)}) == []
        for key in STATES:
            assert torch.equal(reader.full("a", key), whole["a"][key])
        # A file that cannot be opened for want of descriptors is not called damaged.
        resource.setrlimit(resource.RLIMIT_NOFILE, (there, limits[1]))
        with pytest.raises(OSError, match="Too many open files"):
            opened(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
