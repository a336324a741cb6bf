"""What a user, a disk or another process does is told in a sentence, never by a traceback."""

import argparse
import errno
import fcntl
import gzip
import importlib.util
import io
import json
import os
import signal
import socketserver
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from megagpt.corpus import huggingface, unfinished
from megagpt.corpus.command import add_parsers
from megagpt.corpus.digests import Digests
from megagpt.corpus.documents import find_sources
from megagpt.corpus.download import fetch
from megagpt.corpus.huggingface import hub_documents
from megagpt.corpus.inspect import describe
from megagpt.corpus.pipe import prepare
from megagpt.corpus.recipe import PrepareOptions
from megagpt.corpus.unfinished import beside
from megagpt.corpus.unit import plan_units
from megagpt.errors import DamageError, MegagptError, Stopped, UsageError
from megagpt.order.command import add_batch
from tests.corpus.test_inputs import unprivileged
from tests.corpus.test_prepare import decoded, jsonl, sample_texts

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "data_prep").glob("*.py"))


def script(name: str) -> ModuleType:
    """A script of data_prep as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"data_prep/{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """Runs a script of data_prep in this process; returns its exit code."""
    before = signal.getsignal(signal.SIGTERM)

    def run(name: str, *args: object) -> int:
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        return int(script(name).main())

    yield run
    signal.signal(signal.SIGTERM, before)


def options(folder: Path, **changes: object) -> PrepareOptions:
    return PrepareOptions(
        output=folder / "out", **({"backend": "tiktoken", "workers": 1} | changes)
    )


# --- training a tokenizer -----------------------------------------------------------------------


def test_a_tokenizer_is_trained_on_what_is_sound(
    tmp_path: Path, call, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in sample_texts(200)).encode()
    files = {
        "surrogate.jsonl": b'{"text": "a\\ud800b"}\n' + lines,
        "byte.jsonl": b'{"text": "a\xffb"}\n' + lines,
        "cut.jsonl.gz": gzip.compress(lines)[:-20],
        "byte.txt": b"the of \xff",
        # Words of a million characters, on which the trainer and tiktoken would not end.
        "spaces.txt": b"a" + b" " * 1_200_000 + b"b" + b"c" * 100_000,
        "array.json": b'["one two", nope, "\xff", "three"]',
        "utf16.txt": "the of and".encode("utf-16"),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    output = tmp_path / "t.json"
    inputs = [tmp_path / name for name in files]
    assert call("train_tokenizer", *inputs, "--vocab-size", 300, "--output", output) == 0
    said = capsys.readouterr().out
    assert "300 tokens; Hugging Face and tiktoken give the same ids on" in said
    assert "left out: broken JSON 1, invalid UTF-8 4, truncated or damaged file 1" in said
    summary = prepare(inputs, options(tmp_path, tokenizer=str(output)))
    assert summary.documents[0] > 400 and sum(summary.left_out.values()) == 6


def test_a_tokenizer_from_a_pipe_is_compared_on_its_text(
    tmp_path: Path, call, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in sample_texts(200)).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    output = tmp_path / "t.json"
    assert call("train_tokenizer", "-", "--vocab-size", 300, "--output", output) == 0
    assert "the same ids on 200 documents; left out: nothing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--output", "."], "output .: is a folder; give the name of the file to write"),
        (["--vocab-size", "9" * 40], "at most 16777216"),
        (["--vocab-size", "-1"], "must be at least 257"),
    ],
)
def test_a_tokenizer_that_cannot_be_trained_is_refused(
    tmp_path: Path, call, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    path = jsonl(tmp_path / "in.jsonl", ["x"])
    assert call("train_tokenizer", path, "--output", tmp_path / "t.json", *more) == 2
    assert message in capsys.readouterr().err


# --- the command line ---------------------------------------------------------------------------


def test_every_option_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    parsers: dict[str, argparse.ArgumentParser] = {}
    made = argparse.ArgumentParser().add_subparsers()
    add_parsers(made)
    add_batch(made)
    parsers |= {f"data {name}": parser for name, parser in made.choices.items()}
    for path in SCRIPTS:

        def parse(self: argparse.ArgumentParser, name: str = path.stem) -> None:
            parsers[name] = self
            raise SystemExit

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
        with pytest.raises(SystemExit):
            script(path.stem).main()
    assert len(parsers) == len(SCRIPTS) + 5
    for name, parser in parsers.items():
        assert parser.description, name
        for action in parser._actions:
            assert action.help, f"{name} {action.dest}"


def test_closed_input_an_ascii_terminal_and_arrays(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/caf\xe9-\xe4\xb8\xad.jsonl"
    Path(os.fsdecode(name)).write_text('{"text": "one"}\n')
    command = [sys.executable, ROOT / "data_prep/tokenize_corpus.py", "--output", tmp_path / "out"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(
        ["bash", "-c", 'exec "$@" <&-', "bash", *command, name], env=env, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert b"longest document: 2 tokens" in done.stdout and b"caf\\x" in done.stdout
    done = subprocess.run(
        ["bash", "-c", 'exec "$@" <&-', "bash", *command, "-"], env=env, capture_output=True
    )
    assert done.returncode == 2 and b"already holds another corpus" in done.stderr


def test_standard_input_takes_every_format_but_parquet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, (form, content, texts) in enumerate([
        ("json", b'["a", "b"]["c"]', ["a", "b", "c"]),
        ("jsonl", b'{"text": "a"}\n"b"', ["a", "b"]),
        ("text", b"a\nb", ["a\nb"]),
    ]):  # fmt: skip
        read, write = os.pipe()
        os.write(write, content)
        os.close(write)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(open(read, "rb")))
        folder = tmp_path / str(number)
        prepare(["-"], options(folder, format=form))
        assert decoded(folder / "out") == texts
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    with pytest.raises(UsageError, match="no document is left to write .the inputs are empty"):
        prepare(["-"], options(tmp_path / "empty"))
    with pytest.raises(UsageError, match="input -: Parquet is read in any order.* a file"):
        prepare(["-"], options(tmp_path / "parquet", format="parquet"))


def test_stopped_before_the_work_begins(
    monkeypatch: pytest.MonkeyPatch, call, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("megagpt.corpus.pipe.find_sources", stop)
    assert call("tokenize_corpus", tmp_path, "--output", tmp_path / "out") == Stopped.exit_code
    assert "stopped; run the same command again to continue" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["documents", "characters"])
def test_inspect_shows_no_negative_number_of_anything(tmp_path: Path, option: str) -> None:
    made = argparse.ArgumentParser()
    add_parsers(made.add_subparsers())
    args = made.parse_args(["inspect", str(tmp_path), f"--{option}", "-1"])
    with pytest.raises(UsageError, match=f"--{option} -1: must be 0 or more"):
        args.run(args)


def test_inspect_believes_no_damaged_shard(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "in.jsonl", sample_texts(50))
    prepare([path], options(tmp_path, shard_tokens=200))
    good = describe(tmp_path / "out", documents=9)
    for file in sorted((tmp_path / "out").glob("out_*")):
        content = file.read_bytes()
        for place in range(0, len(content), 37):
            # Of tokens only those that are shown are looked at, and whether they are any.
            shown = file.name == "out_00000.bin" and place % 2 and place < 200
            changed = bytearray(content)
            changed[place] = 0xFF if shown else changed[place] ^ 0x80
            file.write_bytes(changed)
            if file.suffix == ".idx" or shown:
                with pytest.raises(DamageError, match="run megagpt data verify|out_0000..idx: "):
                    describe(tmp_path / "out", documents=9)
        file.write_bytes(content[:-2])
        if file.suffix == ".idx" or file.name == "out_00000.bin":
            with pytest.raises(DamageError, match="tokens, .* were written|out_0000..idx: "):
                describe(tmp_path / "out", documents=9)
        file.write_bytes(content)
    assert describe(tmp_path / "out", documents=9) == good


# --- outputs ------------------------------------------------------------------------------------


def test_an_output_without_a_name_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data/in").mkdir(parents=True)
    path = jsonl(tmp_path / "in.jsonl", sample_texts(50))
    for number, place in enumerate((".", "..", "../in/..")):
        monkeypatch.chdir(tmp_path / "data/in" if number else tmp_path / "data")
        assert beside(Path(place), "-x") == tmp_path / "data-x"
    monkeypatch.chdir(tmp_path / "data")
    prepare([path], PrepareOptions(output=Path(), workers=1, validation_fraction=0.5))
    assert len(decoded(tmp_path / "data")) + len(decoded(tmp_path / "data-validation")) == 50
    with pytest.raises(UsageError, match="output /: nothing lies beside it; choose a folder"):
        beside(Path("/"), "-validation")


def test_an_output_that_may_not_be_written(
    tmp_path: Path, call, capsys: pytest.CaptureFixture[str]
) -> None:
    path = jsonl(tmp_path / "in.jsonl", ["x"])
    for output in (path, path / "out", tmp_path / ("x" * 300), Path("/proc/out")):
        assert call("tokenize_corpus", path, "--output", output) == 1
        said = capsys.readouterr().err
        assert str(output)[:60] in said and "Traceback" not in said


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    path = jsonl(tmp_path / "in.jsonl", ["x"])
    monkeypatch.setattr(fcntl, "flock", flock)
    prepare([path], options(tmp_path))
    assert decoded(tmp_path / "out") == ["x"]
    assert f"its file system has no locks ({os.strerror(number)}); start no second" in caplog.text


@pytest.mark.parametrize("name", ["plan.json", "state.json", "000000000.doc"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"units": "x"}', b"\xff\n"])
def test_a_damaged_state_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes
) -> None:
    path = jsonl(tmp_path / "in.jsonl", ["x"])
    monkeypatch.setattr("megagpt.corpus.pipe.write_manifest", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare([path], options(tmp_path))
    (tmp_path / "out/.preparation" / name).write_bytes(content)
    if (name, content) == ("plan.json", b'{"units": "x"}'):
        with pytest.raises(UsageError, match="holds an unfinished preparation of something else"):
            prepare([path], options(tmp_path))
        return
    with pytest.raises(DamageError, match=rf"{name}: not what a preparation writes.*to start"):
        prepare([path], options(tmp_path))


def test_the_digest_of_what_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir(mode=0o755)
    monkeypatch.chdir(tmp_path / "here")
    jsonl(Path("a.jsonl"), ["x"])
    jsonl(Path("b.jsonl"), ["x"])
    os.chmod("a.jsonl", 0)
    sources = find_sources(["a.jsonl", "b.jsonl"]).sources
    with unprivileged(), Digests(sources) as digests:
        for unit in plan_units(sources):
            digests.take(unit)
        assert [bool(entry["sha256"]) for entry in digests.entries()] == [False, True]


# --- what comes over the network ----------------------------------------------------------------


def test_a_data_set_that_breaks_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Iterator[dict]:
        yield {"text": "a"}
        raise ConnectionError("peer reset\nmore")

    monkeypatch.setattr(huggingface, "open_dataset", lambda *_: rows())
    with pytest.raises(MegagptError, match="hf:a/b: broke off .peer reset.; run the same command"):
        prepare([hub_documents("hf:a/b", "text")], options(tmp_path))


def test_downloads_that_break_off(tmp_path: Path) -> None:
    class Cut(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.rfile.readline()
            self.wfile.write(self.server.answer)  # type: ignore[attr-defined]

    with socketserver.TCPServer(("127.0.0.1", 0), Cut) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for answer in (b"nonsense\r\n\r\n", b"HTTP/1.0 200 OK\r\nContent-Length: 99\r\n\r\nshort"):
            server.answer = answer  # type: ignore[attr-defined]
            with pytest.raises(
                UsageError, match="cannot be downloaded .(it broke off after 5|non)"
            ):
                fetch(f"http://127.0.0.1:{server.server_address[1]}/x", tmp_path / "x")
            assert not (tmp_path / "x").exists()
        server.shutdown()
    with pytest.raises(UsageError, match="cannot be downloaded .unknown url type"):
        fetch("nothing", tmp_path / "x")


def test_copies_that_are_no_text8_or_shakespeare(
    tmp_path: Path, call, capsys: pytest.CaptureFixture[str]
) -> None:
    good = tmp_path / "good.zip"
    with zipfile.ZipFile(good, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("text8", "a b c " * 500)
    content = good.read_bytes()
    data = content.index(b"text8") + 5
    for bad in (
        content[:data] + b"\xff" * 9 + content[data + 9 :],
        content.replace(b"text8", b"text9"),
        # Encrypted, says a flag.
        content.replace(b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01"),
        b"caf\xe9",
    ):
        assert bad != content
        path = tmp_path / "bad"
        path.write_bytes(bad)
        assert call("text8", "--file", path, "--output", tmp_path / "o") == 3
        assert f"{path}: not text8" in capsys.readouterr().err
    assert call("tiny_shakespeare", "--file", path, "--output", tmp_path / "o") == 3
    assert f"{path}: not the plays" in capsys.readouterr().err
    assert call("tiny_shakespeare", "--file", tmp_path / "no", "--output", tmp_path / "o") == 1
    assert f"{tmp_path / 'no'}: No such file" in capsys.readouterr().err


def test_an_address_with_braces(
    call, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for source in ("hf:{x}", "hf:{0}", "hf:{"):
        assert call("wikipedia", "--source", source, "--output", tmp_path / "o") == 2
        assert "cannot be opened" in capsys.readouterr().err
    assert unfinished.FOLDER == ".preparation"
