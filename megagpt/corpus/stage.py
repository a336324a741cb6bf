"""A corpus on a host's own disk: copied once by one process of the host, each file against its
checksum (L1).

    srun --ntasks-per-node=1 megagpt data stage data/web /local/scratch
"""

import argparse
import fcntl
import json
import shutil
from pathlib import Path
from typing import Any

from megagpt.corpus.manifest import MANIFEST, read_manifest
from megagpt.errors import EXIT_OK, DamageError, UsageError
from megagpt.files import copy_hashed, file_sha256, whole_file, write_file

STATE = ".staged.json"
"""In the copy: what its files were when they were found whole."""


def add_stage(subparsers: Any) -> None:
    """Adds `stage` to the commands of `megagpt data`."""
    staged = subparsers.add_parser(
        "stage",
        help="copy corpora to a host's own disk, once, each file against its checksum",
        description="Copies folders of shards below SCRATCH; of several processes on a host one "
        "copies and the others wait. Files that are there already and whole are kept. Prints where "
        "each copy is, for data.train and data.validation.",
        epilog="Exit codes: 0 done; 2 no corpus, or no room; 3 a damaged file, named.",
    )
    staged.add_argument(
        "folders", type=Path, nargs="+", metavar="DIR", help="folder with a manifest.json"
    )
    staged.add_argument(
        "scratch", type=Path, metavar="SCRATCH", help="a folder of this host's disk"
    )
    staged.set_defaults(run=run_stage)


def run_stage(args: argparse.Namespace) -> int:
    """Copies corpora and prints where they are."""
    if len({folder.resolve().name for folder in args.folders}) < len(args.folders):
        raise UsageError(
            f"{', '.join(map(str, args.folders))}: folders of one name would be one copy; give "
            "them a SCRATCH each"
        )
    for folder in args.folders:
        copy, size = stage(folder, args.scratch)
        print(f"{copy}: {size:,} bytes copied")
    return EXIT_OK


def stage(folder: Path, scratch: Path) -> tuple[Path, int]:
    """(the copy of a corpus below `scratch`, bytes that were copied); all processes of a host may
    call it, and one of them copies.

    Files that are there already and whole are kept. Raises UsageError where the disk has no room,
    DamageError for a file that is not what the manifest says; neither leaves such a file behind.
    """
    manifest, target = read_manifest(folder), scratch / folder.resolve().name
    if target.resolve() == folder.resolve():
        raise UsageError(f"{scratch}: {folder} lies there already; give another folder")
    # Of a corpus that has grown since, the copy would keep the old one.
    digests = {MANIFEST: file_sha256(folder / MANIFEST)}
    for shard in manifest.shards:
        digests |= {path.name: digest for path, _, digest in manifest.files(shard)}
    if manifest.tokenizer_name.endswith(".json"):
        digests[manifest.tokenizer_name] = manifest.tokenizer_sha256
    target.mkdir(parents=True, exist_ok=True)
    with (target / ".staging").open("w") as lock:
        # The processes that wait find the copy made.
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = _recall(target / STATE)
        wanted = [n for n in digests if known.get(n) != _state(target / n, digests[n])]
        needed = sum((folder / name).stat().st_size for name in wanted)
        if needed > (free := shutil.disk_usage(target).free):
            raise UsageError(
                f"{target}: {needed:,} bytes are needed and {free:,} are free; give another place"
            )
        # The old manifest goes first, the new one comes last: a folder with one is whole.
        if MANIFEST in wanted:
            (target / MANIFEST).unlink(missing_ok=True)
        for name in sorted(wanted, key=lambda name: name == MANIFEST):
            _copy(folder / name, target / name, digests[name])
        for name in known.keys() - digests.keys():  # of a corpus that had more
            (target / name).unlink(missing_ok=True)
        states = {name: _state(target / name, digest) for name, digest in digests.items()}
        if wanted:
            write_file(target / STATE, json.dumps(states, indent=1) + "\n")
    return target, needed


def _copy(source: Path, target: Path, digest: str) -> None:
    """Copies a file so that it is whole or not there. digest: its sha256, "" for any."""
    with whole_file(target) as copy:
        found = copy_hashed(source, copy)
        if digest and found != digest:
            raise DamageError(
                f"{source}: sha256 {found[:12]}..., the manifest says {digest[:12]}...; restore "
                "the file from a copy, or prepare the corpus again"
            )


def _recall(path: Path) -> dict[str, str]:
    """What was found whole; a state that cannot be read only costs time."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _state(path: Path, digest: str) -> str:
    """Changes whenever the file or what is expected of it changes."""
    try:
        found = path.stat()
    except OSError:
        return "missing"
    return f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {found.st_ino} {digest}"
