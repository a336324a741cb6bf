"""Which files an input means: nothing is passed over, or read twice, without being named."""

import contextlib
import io
import json
import logging
import os
import shutil
import socket
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megagpt.corpus.documents import Inputs, find_sources
from megagpt.corpus.manifest import read_manifest
from megagpt.corpus.pipe import prepare
from megagpt.corpus.recipe import PrepareOptions
from megagpt.corpus.texts import Item, Problem, join, read
from megagpt.corpus.unit import Unit, plan_units
from megagpt.errors import DamageError, UsageError
from tests.corpus.test_prepare import decoded, jsonl


def everything(found: Inputs) -> tuple[list[str], list[Problem]]:
    """All documents and problems of the inputs, read in this process."""
    items: list[Item] = []
    for unit in plan_units(found.sources, unit_bytes=200):
        items += join(read(unit, "text"))
    return (
        [item[1] for item in items if not isinstance(item, Problem)],
        [item for item in items if isinstance(item, Problem)],
    )


def names(found: Inputs) -> list[str]:
    return [os.path.relpath(source.path, os.getcwd()) for source in found.sources]


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Permissions count, also when the tests run as root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in which the test is, so that it needs no permission above it."""
    (tmp_path / "here").mkdir(mode=0o755)
    monkeypatch.chdir(tmp_path / "here")
    return Path()


def test_folders_and_files_without_permission_are_named(here: Path) -> None:
    for folder in ("in/a", "in/b", "in/c"):
        Path(folder).mkdir(parents=True)
        jsonl(Path(folder) / "x.jsonl", [folder])
        (Path(folder) / "x.txt").write_text(folder)
    os.chmod("in/b", 0)
    os.chmod("in/c", 0o444)
    for name in ("x.jsonl", "x.txt"):
        os.chmod(f"in/a/{name}", 0)
    jsonl(Path("in/d.jsonl"), ["good"])
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x"]}), "in/a/x.parquet")
    os.chmod("in/a/x.parquet", 0)
    with unprivileged():
        found = find_sources(["in"])
        texts, problems = everything(found)
    denied = "Permission denied"
    # A folder that can be listed only does not say what its entries are.
    assert sorted(found.problems) == [
        ("in/b", "unreadable folder", denied),
        ("in/c/x.jsonl", "unreadable file", denied), ("in/c/x.txt", "unreadable file", denied),
    ]  # fmt: skip
    assert texts == ["good"]
    assert [(p.reason, denied in p.detail) for p in problems] == [("unreadable file", True)] * 3
    os.chmod("in/b", 0o755)


def test_links_are_followed_once(here: Path) -> None:
    Path("in/sub").mkdir(parents=True)
    Path("elsewhere").mkdir()
    jsonl(Path("in/sub/a.jsonl"), ["a"])
    jsonl(Path("elsewhere/b.jsonl"), ["b"])
    os.symlink("../elsewhere", "in/linked")
    os.symlink("..", "in/sub/up")
    os.symlink("nowhere", "in/dangling")
    os.symlink("loop.jsonl", "in/loop.jsonl")
    found = find_sources(["in"])
    assert names(found) == ["in/linked/b.jsonl", "in/sub/a.jsonl"]
    assert [(path, reason) for path, reason, _ in found.problems] == [
        ("in/sub/up", "folder given more than once"),
        ("in/dangling", "unreadable file"),
        ("in/loop.jsonl", "unreadable file"),
    ]
    again = find_sources(["in/sub", "in"])
    assert names(again) == ["in/sub/a.jsonl", "in/sub/up/linked/b.jsonl"]
    # `up` leads to `in`, which is therefore read before it is given.
    assert ("in", "folder given more than once", "") in again.problems


def test_what_is_no_file_is_named_or_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("in").mkdir()
    os.mkfifo("in/pipe.jsonl")
    os.mkfifo("in/pipe.json")  # of which the beginning must not be looked at
    os.mkfifo("in/pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("in/socket.txt")
        found = find_sources(["in"])
        assert [(path, reason) for path, reason, _ in found.problems] == [
            ("in/pipe.json", "no regular file"), ("in/pipe.jsonl", "no regular file"),
            ("in/socket.txt", "no regular file"),
        ]  # fmt: skip
        assert (found.sources, found.others) == ([], ["in/pipe"])
        for path in ("in/pipe.jsonl", "in/socket.txt", "/dev/null", "/dev/zero"):
            with pytest.raises(
                UsageError, match=f"input {path}: a pipe, socket or device.* give -"
            ):
                find_sources([path], "jsonl")
    with pytest.raises(UsageError, match="no file to tokenize.*in/pipe.jsonl: no regular file"):
        prepare(["in"], PrepareOptions(output=Path("out")))
    text = io.TextIOWrapper(io.BytesIO(b'{"text": "a"}\n'))
    monkeypatch.setattr("sys.stdin", text)
    found = find_sources(["/dev/stdin", "-", "/dev/fd/0"])
    assert everything(found)[0] == ["a"]
    assert found.problems == [("standard input", "file given more than once", "")] * 2


def test_globs_take_folders_and_names_with_brackets(here: Path) -> None:
    for name in ("runs[1]/a.jsonl", "runs1/b.jsonl", "runs[1]/sub[2]/c.jsonl", "runs[1]/d[x].txt"):
        Path(name).parent.mkdir(exist_ok=True, parents=True)
        jsonl(Path(name), [name])
    assert names(find_sources(["runs[1]/*.jsonl"])) == ["runs[1]/a.jsonl"]
    assert names(find_sources(["runs[1]/*/*.jsonl"])) == ["runs[1]/sub[2]/c.jsonl"]
    assert names(find_sources(["runs[1]/d[x].txt"])) == ["runs[1]/d[x].txt"]
    assert names(find_sources(["runs[0-9]/*"])) == ["runs1/b.jsonl"]
    below = ["runs[1]/a.jsonl", "runs[1]/d[x].txt", "runs[1]/sub[2]/c.jsonl"]
    for pattern in ("runs[1]", "runs[1]/*", "runs[1]/**", "run?[1]*", "runs[[]*"):
        found = find_sources([pattern])
        assert names(found) == (below if pattern != "run?[1]*" else ["runs1/b.jsonl"])
        assert not found.problems


def test_an_output_inside_the_input_is_no_input(here: Path) -> None:
    jsonl(Path("a.jsonl"), ["a", "b"])
    Path("notes").mkdir()
    Path("notes/manifest.json").write_text('["mine"]')
    for output in ("out", "."):
        for _ in range(2):
            options = PrepareOptions(output=Path(output), workers=1, validation_fraction=0.5)
            summary = prepare(["."], options)
        assert summary.finished_before
        sources = [source["path"] for source in read_manifest(output).sources]
        assert sources == ["./a.jsonl", "./notes/manifest.json"]
    shutil.rmtree("out-validation")
    assert len(decoded(Path())) + len(decoded(Path("../here-validation"))) == 3


def test_strict_stops_at_what_is_passed_over(here: Path) -> None:
    Path("in").mkdir()
    jsonl(Path("in/a.jsonl"), ["a"])
    os.symlink("nowhere", "in/b")
    summary = prepare(["in"], PrepareOptions(output=Path("out"), workers=1))
    assert summary.left_out == {"unreadable file": 1}
    with pytest.raises(DamageError, match="in/b: unreadable file .No such file"):
        prepare(["in"], PrepareOptions(output=Path("strict"), workers=1, strict=True))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
def test_other_encodings_are_named(here: Path, encoding: str) -> None:
    text = "plain text, and a line\n" * 20
    for name, content in {
        "a.txt": text, "b.jsonl": json.dumps({"text": text}) + "\n", "c.json": json.dumps([text]),
    }.items():  # fmt: skip
        Path(name).write_bytes(content.encode(encoding))
    Path("d.txt").write_text("text with \0 one NUL")
    texts, problems = everything(find_sources(["."]))
    assert texts == ["text with \0 one NUL"]
    name = encoding[:6].upper()
    assert [problem.reason for problem in problems] == ["invalid UTF-8"] * 3
    assert all(f"it is {name}; convert it: iconv -f {name}" in p.detail for p in problems)


@pytest.mark.parametrize("compression", ["", "gz"])
def test_an_archive_is_no_text(here: Path, compression: str) -> None:
    Path("a.md").write_text("one document")
    with tarfile.open("all.txt", f"w:{compression}") as archive:
        archive.add("a.md")
    if compression:
        Path("all.txt").rename("all.txt.gz")
    texts, [problem] = everything(find_sources(["."]))
    assert texts == ["one document"]
    assert problem.reason == "no text" and problem.detail == "it is a tar archive; unpack it first"


def test_a_disk_that_fails_leaves_out_what_it_held(here: Path) -> None:
    # The memory of a process cannot be read at its start: EIO, as from a broken disk.
    failing = (("/proc/self/mem", ""),)
    for unit in (
        Unit(kind="range", sources=(0,), files=failing, start=0, end=100),
        Unit(kind="range", sources=(0,), files=failing, start=100, end=200),
        Unit(kind="files", sources=(0,), files=failing),
    ):
        (problem,) = read(unit, "text")
        assert isinstance(problem, Problem) and problem.reason == "unreadable file"
        assert "Input/output error" in problem.detail
    for name in ("a.jsonl", "b.jsonl.gz", "c.json"):
        os.symlink("/proc/self/mem", name)
        texts, problems = everything(find_sources([name]))
        assert texts == [] and [problem.reason for problem in problems] == ["unreadable file"]


def test_a_name_that_is_no_utf8_stays_readable(
    here: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    # Workers of the tests cannot pass such a name on, not even in what was printed.
    caplog.set_level(logging.CRITICAL + 1, "megagpt")
    path = os.fsdecode(b"caf\xe9.jsonl")
    jsonl(Path(path), ["a"])
    options = PrepareOptions(output=Path("out"), workers=1, decontaminate=(path,))
    Path("other.txt").write_text("something else entirely")
    Path(path).write_text(json.dumps({"text": "one two three four five six seven " * 3}))
    prepare([path, "other.txt"], options)
    manifest = read_manifest("out")
    assert [source["path"] for source in manifest.sources] == [path, "other.txt"]
    assert prepare([path, "other.txt"], options).finished_before
    capsys.readouterr()
