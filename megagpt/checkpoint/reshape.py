"""A checkpoint cut anew: fewer or more files, no tensor split, the same state (L2).

No layout needs it, since training reads any cut by itself. It is for moving a checkpoint: the
thousand files of a cluster into the one file of a workstation, or back into as many as will read.
"""

import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megagpt.checkpoint import record as manifests
from megagpt.checkpoint.model import newest
from megagpt.checkpoint.slice_file import SliceReader, write_slices
from megagpt.engine.slices import Slice
from megagpt.errors import UsageError
from megagpt.files import sync_folder


def reshape(run: Path, output: Path, ranks: int = 1) -> Path:
    """Writes the newest checkpoint of `run` into the run folder `output`, cut for `ranks` ranks.

    Memory: one parameter. Returns the new checkpoint's folder. Raises UsageError when it is there
    already or `ranks` is below 1, DamageError when the checkpoint is damaged.
    """
    if ranks < 1:
        raise UsageError(f"--ranks {ranks}: must be 1 or more")
    source = newest(run)
    manifest = manifests.read_manifest(source)
    folder = manifests.folder_of(output) / manifests.name_of(manifest.step)
    if folder.exists():
        raise UsageError(f"{folder}: is there already; give another run folder")
    temporary = folder.with_name(folder.name + manifests.TEMPORARY)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    reader = SliceReader(source)
    records = [
        write_slices(temporary / f"rank_{rank:05d}.safetensors", _cut(reader, rank, ranks))
        for rank in range(ranks)
    ]
    shutil.copyfile(source / "config.toml", temporary / "config.toml")
    files = (*records, manifests.record_of(temporary / "config.toml"))
    layout = {"world": ranks, "pipeline": 1, "tensor": 1}
    manifests.write_manifest(temporary, dataclasses.replace(manifest, files=files, layout=layout))
    sync_folder(temporary)
    os.replace(temporary, folder)
    manifests.write_file(folder.parent / "latest", folder.name + "\n")
    return folder


def _cut(reader: SliceReader, rank: int, ranks: int) -> Iterator[Slice]:
    """An equal stretch of every parameter, read when it is written."""
    for name in reader.names:
        size = reader.numel(name)
        start, end = size * rank // ranks, size * (rank + 1) // ranks
        if start == end:
            continue
        yield reader.slice(name, start, end - start)
