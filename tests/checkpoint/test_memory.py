"""A checkpoint is cut anew and read in a fraction of its size, under a limit that the system keeps.

`pytest -m slow tests/checkpoint/test_memory.py -s` does it with GPT-3 1.3b's 16 GB, twice on the
disk, and prints the figures of docs/explanation/what-was-measured.md.
"""

import os
import resource
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megagpt.checkpoint import record
from megagpt.checkpoint.slice_file import SliceReader, write_slices
from megagpt.config import RunConfig, dump_run, load_run
from megagpt.engine.pipeline import split_kind
from megagpt.engine.slices import STATES, Slice, TensorShare
from megagpt.model import GPT
from tests.lib.corpus import run_file
from tests.lib.distributed import ROOT, environment

MB = 1_000_000
TENSOR = DATA = 2
"""The checkpoint is that of two tensor ranks, times two that share the optimizer."""

READ = """
import sys
from pathlib import Path
from tests.checkpoint.test_memory import one_rank_reads
for folder in sys.argv[1:]:
    one_rank_reads(Path(folder))
"""


def shapes_of(config: RunConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in GPT(config.model).named_parameters()}


def held(
    shapes: dict[str, tuple[int, ...]],
    tensor: tuple[int, int],
    data: tuple[int, int],
    sparse: bool = False,
) -> Iterator[Slice]:
    """The slices of one rank, given as (its number, how many there are); drawn when read."""
    for name, whole in shapes.items():
        kind = split_kind(name)
        if kind == "whole" and tensor[0] > 0:
            continue
        part, parts = tensor if kind != "whole" else (0, 1)
        shape = list(whole)
        axis = 1 if kind == "row" else 0
        # The embedding's rows are padded to a multiple of the tensor ranks.
        shape[axis] = -(-shape[axis] // parts)
        size = torch.Size(shape).numel()
        start, end = (size * n // data[1] for n in (data[0], data[0] + 1))
        yield Slice(
            name=name,
            shape=tuple(shape),
            split=TensorShare(kind=kind, part=part, parts=parts),
            start=start,
            numel=end - start,
            owned=True,
            read=lambda key, n=end - start, place=(name, part, start): (
                torch.zeros(n) if sparse and key != "fp32" else drawn(n, (key, *place))
            ),
            write=lambda key, value: None,
        )


def drawn(numel: int, place: tuple[object, ...]) -> torch.Tensor:
    draw = torch.Generator().manual_seed(zlib.crc32(repr(place).encode()))
    return torch.empty(numel).uniform_(generator=draw)


def write_checkpoint(run: Path, config: RunConfig, sparse: bool = False) -> Path:
    """A checkpoint of the run's model with random weights and moments, one parameter in memory.
    sparse: moments of 0, which take no room on the disk."""
    folder = record.folder_of(run) / record.name_of(1)
    folder.mkdir(parents=True)
    shapes = shapes_of(config)
    places = [(t, d) for d in range(DATA) for t in range(TENSOR)]
    records = []
    for rank, (t, d) in enumerate(places):
        path = folder / f"rank_{rank:05d}.safetensors"
        records.append(write_slices(path, held(shapes, (t, TENSOR), (d, DATA), sparse)))
        if sparse:
            subprocess.run(["fallocate", "--dig-holes", path], check=True)
    (folder / "config.toml").write_text(dump_run(config))
    facts = {"step": 1, "tokens": 1, "samples": 1, "seed": 1, "skipped_steps": 0, "updates": 1}
    state = {"loss_scale": {}, "data": {}, "versions": {}, "milestone": False}
    layout = {"world": TENSOR * DATA, "pipeline": 1, "tensor": TENSOR}
    files = (*records, record.FileRecord.of(folder / "config.toml"))
    record.write_record(
        folder, record.CheckpointRecord(**facts, **state, layout=layout, files=files)
    )
    return folder


def one_rank_reads(folder: Path) -> None:
    """What the first rank of another layout, of four tensor ranks, loads: everything it holds."""
    config = load_run(folder / "config.toml")
    reader, numel = SliceReader(folder), 0
    for one in held(shapes_of(config), (0, 4), (0, 1)):
        for key in STATES:
            numel += reader.read(one, key).numel()
    print(numel)


def measured(words: list[str], limit: int = 0) -> tuple[int, int, float]:
    """(peak of the resident memory, of the address space, seconds) of a command, both in bytes.

    limit: bytes of address space beyond which the system refuses memory; 0: none.
    """
    t0 = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env=environment(),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)) if limit else 0,
    )
    space = 0
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            assert process.returncode == 0, words
            return usage.ru_maxrss * 1024, space, time.monotonic() - t0
        found = Path(f"/proc/{process.pid}/status").read_text().partition("VmPeak:")[2]
        space = int(found.split()[0]) * 1024 if found else space
        time.sleep(0.01)


def cut_anew(config: RunConfig, root: Path, allowance: int) -> Path:
    """Reshapes with `allowance` bytes beyond what the command takes to start; the source."""
    source = write_checkpoint(root / "run", config)
    size = sum(f.stat().st_size for f in source.iterdir())
    assert size > 4 * allowance
    command = ["-m", "megagpt", "checkpoint"]
    within(
        allowance,
        f"{size / MB:,.0f} MB, reshape",
        [*command, "list", str(root / "run")],
        [*command, "reshape", str(root / "run"), str(root / "new")],
    )
    (new,) = record.list_checkpoints(root / "new")
    old_reader, new_reader = SliceReader(source), SliceReader(new)
    for name in old_reader.names:
        for key in STATES:
            assert torch.equal(old_reader.full(name, key), new_reader.full(name, key)), name
    return source


def within(allowance: int, what: str, nothing: list[str], everything: list[str]) -> None:
    """A command takes at most `allowance` bytes more than one that starts and does nothing."""
    base, space, _ = measured(nothing)
    peak, _, seconds = measured(everything, limit=space + allowance)
    print(
        f"{what}: {seconds:.0f} s, peak of the memory {peak / MB:,.0f} MB, "
        f"{(peak - base) / MB:,.0f} of them for the checkpoint"
    )
    assert peak - base < allowance


def test_memory_is_that_of_a_parameter(tmp_path):
    # 150 MB of state, of which no parameter has more than 4 MB.
    file = run_file(tmp_path, model={"n_layer": 4, "d_model": 512})
    cut_anew(load_run(file), tmp_path, allowance=35 * MB)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_memory_for_gpt3_1_3b(tmp_path):
    sources = 'output = "x"\n[data]\ntrain = [{ path = "x" }]\n'
    (tmp_path / "run.toml").write_text('model = "gpt3-1.3b"\n' + sources)
    # Its largest parameter has 412 MB, which two tensor ranks' halves are joined to.
    allowance = 1500 * MB
    source = cut_anew(load_run(tmp_path / "run.toml"), tmp_path, allowance)
    within(allowance, "one rank of TP4 reads", ["-c", READ], ["-c", READ, str(source)])
