"""Inputs of a preparation: which files, in which format. Nothing that an input means is passed over
without being named."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megagpt.corpus.open import BOM, COMPRESSIONS, head_of
from megagpt.errors import UsageError

FORMATS = ("text", "jsonl", "json", "parquet")
SUFFIXES = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
}
STANDARD_INPUT = ("-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")
"""Workers have another standard input, so that its names must not pass for files."""
OURS = ("manifest.json", "tokenizer.json")
"""Files beside shards: an output folder may lie inside the input."""


@dataclass(frozen=True)
class Documents:
    """Documents from Python: `texts()` starts from the first one each time it is called."""

    name: str
    texts: Callable[[], Iterable[Any]]


@dataclass(frozen=True)
class Source:
    """One input file, standard input (path `-`) or an iterator of documents."""

    path: str
    format: str
    compression: str = ""
    bytes: int = 0
    """On the disk; 0 when it is not known before reading."""
    mtime_ns: int = 0
    documents: Documents | None = None

    @property
    def is_file(self) -> bool:
        """Whether it is a file, whose size is known."""
        return self.path != "-" and self.documents is None


def total_bytes(sources: Sequence[Source]) -> int:
    """Bytes of all sources; 0 where that is not known of one."""
    return sum(source.bytes for source in sources) if all(s.is_file for s in sources) else 0


@dataclass
class Inputs:
    """What `find_sources` found."""

    sources: list[Source] = field(default_factory=list)
    problems: list[tuple[str, str, str]] = field(default_factory=list)
    """(path, reason, detail) of what was passed over: files and folders that were given more than
    once, of which the first counts, that cannot be read, or that are no files."""
    others: list[str] = field(default_factory=list)
    """Files of folders with endings that are not known."""
    seen: set[tuple[int, int]] = field(default_factory=set)
    """Device and number of each file and folder so far."""

    def pass_over(self, path: str, reason: str, detail: str = "") -> None:
        """Name what is not read."""
        self.problems.append((path, reason, detail))

    def is_new(self, path: str, status: os.stat_result) -> bool:
        """Whether the file or folder comes for the first time; names it when it does not."""
        key = (status.st_dev, status.st_ino)
        if key in self.seen:
            kind = "folder" if stat.S_ISDIR(status.st_mode) else "file"
            self.pass_over(path, f"{kind} given more than once")
        new = key not in self.seen
        self.seen.add(key)
        return new


def find_sources(inputs: Iterable[str | Path | Documents], format: str | None = None) -> Inputs:
    """Expand files, folders, globs, `-` and `Documents` into sources, in the order given; the
    files of a folder or glob are sorted by path, links are followed. `format` is used for every
    file.

    Raises UsageError for an input that does not exist, is a pipe or has an ending that means no
    format.
    """
    found = Inputs()
    for item in inputs:
        if isinstance(item, Documents):
            found.sources.append(Source(item.name, "documents", documents=item))
        elif str(item) in STANDARD_INPUT:
            if any(source.path == "-" for source in found.sources):
                found.pass_over("standard input", "file given more than once")
            else:
                found.sources.append(Source("-", format or "jsonl"))
        elif os.path.lexists(item) and not os.path.isdir(item):
            _add_file(found, str(item), format, named=True)
        else:
            for path in _expand(found, str(item)):
                _add_file(found, path, format, named=False)
    return found


def _expand(found: Inputs, item: str) -> list[str]:
    """The files that a folder or glob means. Raises UsageError when there is none."""
    if os.path.isdir(item):
        return _files_below(found, item)
    matches = glob.glob(_without_brackets(item), recursive=True)
    paths = {path for path in matches if not os.path.isdir(path)}
    # `**` gives the files of the folders that it matches itself.
    if "**" not in item:
        paths.update(
            p for folder in sorted(set(matches) - paths) for p in _files_below(found, folder)
        )
    if not paths:
        raise UsageError(f"input {item}: no such file or folder, and no file matches it")
    return sorted(paths)


def _without_brackets(item: str) -> str:
    """The glob with what stands in it literally, as the folder `runs[1]` in `runs[1]/*.txt`,
    escaped."""
    folder, pattern = os.path.split(item)
    while folder not in ("", os.sep) and not os.path.isdir(folder):
        folder, name = os.path.split(folder)
        pattern = os.path.join(name, pattern)
    return os.path.join(glob.escape(folder), pattern)


def _add_file(found: Inputs, path: str, format: str | None, named: bool) -> None:
    """Add one file; what is none is refused where it was named, and counted where it was found."""
    try:
        status = os.stat(path)
    except OSError as error:
        found.pass_over(path, "unreadable file", error.strerror or str(error))
        return
    problem = "" if stat.S_ISREG(status.st_mode) else "a pipe, socket or device, which is no file"
    if problem and named:
        raise UsageError(
            f"input {path}: {problem}; send its content to standard input and give - as the input"
        )
    kind, compression = _format(path, format)
    if not kind and named:
        raise UsageError(
            f"input {path}: its ending is none of {', '.join(SUFFIXES)} (or these with "
            f"{', '.join(COMPRESSIONS)}); say what it holds with --format"
        )
    if not kind:
        found.others.append(path)
    elif problem:
        found.pass_over(path, "no regular file", problem)
    elif found.is_new(path, status):
        # Lines of JSON in a file called .json are common.
        first = head_of(path, compression) if kind == "json" and not format else b""
        kind = "jsonl" if first.removeprefix(BOM).lstrip().startswith(b"{") else kind
        size, time_ns = status.st_size, status.st_mtime_ns
        found.sources.append(Source(path, kind, compression, size, time_ns))


def _files_below(found: Inputs, folder: str) -> list[str]:
    """What is no folder below a folder, sorted by path; hidden names and what we write beside
    shards are left out. Folders that cannot be read are named."""

    def failed(error: OSError) -> None:
        found.pass_over(error.filename, "unreadable folder", error.strerror or "")

    paths: list[str] = []
    if not _enters(found, folder):
        return paths
    for root, folders, files in os.walk(folder, onerror=failed, followlinks=True):
        shown = sorted(name for name in folders if not name.startswith("."))
        folders[:] = [name for name in shown if _enters(found, os.path.join(root, name))]
        ours = OURS if any(name.endswith(".idx") for name in files) else ()
        paths += [
            os.path.join(root, name)
            for name in files
            if not name.startswith(".") and name not in ours
        ]
    return sorted(paths)


def _enters(found: Inputs, folder: str) -> bool:
    """Whether a folder is read: each is once, since a link may lead back above itself."""
    try:
        return found.is_new(folder, os.stat(folder))
    except OSError as error:
        found.pass_over(folder, "unreadable folder", error.strerror or "")
        return False


def _format(path: str, format: str | None) -> tuple[str, str]:
    """(format, compression) by the endings; format is empty when unknown."""
    stem, ending = os.path.splitext(path)
    compression = COMPRESSIONS.get(ending.lower(), "")
    if compression:
        ending = os.path.splitext(stem)[1]
    kind = format or SUFFIXES.get(ending.lower(), "")
    if kind == "parquet":
        compression = ""
    return kind, compression
