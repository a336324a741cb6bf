"""What preparation survives: damaged input, hostile text, full disks, kills at any moment."""

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from test_data_prep import content, decoded, jsonl, sample_texts

from megagpt.data import unit as unit_module
from megagpt.data.array import array_elements
from megagpt.data.corpus import Options, prepare
from megagpt.data.manifest import read_manifest
from megagpt.errors import DamageError, UsageError
from megagpt.tokenizer import encoder as encoder_module
from megagpt.tokenizer import load_tokenizer
from megagpt.tokenizer.encoder import Encoder, pieces

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "data_prep/tokenize_corpus.py"
ENV = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def options(folder: Path, **changes: object) -> Options:
    return Options(output=folder / "out", **({"backend": "tiktoken", "workers": 2} | changes))


BROKEN = [
    (b'{"text": "\xff"}', "invalid UTF-8", "byte 11 of the line"),
    (b'{"text": "x"', "broken JSON", ""),
    (b'{"other": "x"}', "missing text field", "no field 'text' .fields: other"),
    (b'{"text": null}', "text is not a string", "it is NoneType"),
    (b'{"text": 7}', "text is not a string", "it is int"),
    (b'{"text": ""}', "empty document", ""),
    (b"[1, 2]", "text is not a string", "it is list"),
]


@pytest.mark.parametrize("line, reason, detail", BROKEN)
def test_a_bad_line_is_left_out_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, line: bytes, reason: str, detail: str
) -> None:
    path = tmp_path / "in.jsonl"
    good = b'{"text": "good"}\n'
    path.write_bytes(good * 5 + b"\n" + line + b"\n" + good * 5)
    summary = prepare([path], options(tmp_path, unit_bytes=40))
    assert decoded(tmp_path / "out") == ["good"] * 10
    assert summary.left_out == {reason: 1}
    assert f"{path}:7: {reason}" in caplog.text and f"{reason}: 1" in summary.text()
    with pytest.raises(DamageError, match=rf"in.jsonl:7: {reason}.*{detail}.*without --strict"):
        prepare([path], options(tmp_path / "strict", strict=True))


def test_strict_passes_where_nothing_is_wrong(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "in.jsonl", sample_texts(10))
    assert sum(prepare([path], options(tmp_path, strict=True)).documents) == 10


def test_bom_blank_lines_and_no_final_newline(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n{"text": "b", "x": NaN}')
    for unit_bytes in (5, 1 << 20):
        folder = tmp_path / str(unit_bytes)
        assert not prepare([path], options(folder, unit_bytes=unit_bytes)).left_out
        assert decoded(folder / "out") == ["a", "b"]


def test_lone_surrogates_become_replacement_characters(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "a\\ud800b"}\n{"text": "\\ud83d\\ude00"}\n')
    summary = prepare([path], options(tmp_path))
    assert decoded(tmp_path / "out") == ["a\ufffdb", "\U0001f600"]
    assert summary.notes == {"lone surrogates replaced by U+FFFD": 1}


def test_text_files_that_are_not_utf8_or_empty(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "in/b.txt").touch()
    (tmp_path / "in/c.txt").write_bytes(b"\xef\xbb\xbfgood")
    summary = prepare([tmp_path / "in"], options(tmp_path))
    assert decoded(tmp_path / "out") == ["good"]
    assert summary.left_out == {"invalid UTF-8": 1, "empty document": 1}
    assert "a.txt: invalid UTF-8 (byte 4: unexpected end of data); left out" in caplog.text


@pytest.mark.parametrize("ending", ["gz", "zst"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.json"])
def test_truncated_compressed_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, ending: str, name: str
) -> None:
    draw = random.Random(5)
    texts = [str(draw.random()) * 20 for _ in range(2000)]
    raw = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if name == "a.json":
        raw = json.dumps(texts).encode()
    packed = gzip.compress(raw) if ending == "gz" else zstandard.ZstdCompressor().compress(raw)
    path = tmp_path / f"{name}.{ending}"
    path.write_bytes(packed[: len(packed) * 3 // 4])
    good = jsonl(tmp_path / "good.jsonl", ["good"])
    summary = prepare([path, good], options(tmp_path, unit_bytes=4000))
    assert summary.left_out == {"truncated or damaged file": 1}
    found = decoded(tmp_path / "out")
    assert found[:-1] == ([] if name == "a.txt" else texts[: len(found) - 1])
    assert found[-1] == "good" and (name == "a.txt" or len(found) > 100 or ending == "zst")
    assert path.name in caplog.text and "truncated or damaged file" in caplog.text


def test_damaged_parquet(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
    pyarrow.parquet.write_table(pyarrow.table({"x": ["y"]}), tmp_path / "b.parquet")
    table = pyarrow.table({"text": ["good", None, ""]})
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    summary = prepare([tmp_path / f"{name}.parquet" for name in "abc"], options(tmp_path))
    assert decoded(tmp_path / "out") == ["good"]
    assert summary.left_out == {
        "truncated or damaged file": 1, "missing text field": 1,
        "text is not a string": 1, "empty document": 1,
    }  # fmt: skip
    assert "no column 'text' (columns: x)" in caplog.text
    assert "c.parquet: document 2" in caplog.text


@pytest.mark.parametrize(
    ("text", "elements", "message"),
    [
        ('["a", 12, {"b": [1]}, null]', ["a", 12, {"b": [1]}, None], ""),
        ("[]", [], ""),
        (' [ 1 , "\u00e9" ] ', [1, "\u00e9"], ""),
        ('{"a": 1}', [], "not a JSON array"),
        ("", [], "not a JSON array"),
        ('["a" "b"]', ["a"], "'\"' between elements"),
        ('["a", "b"', ["a", "b"], "the array has no end"),
        ('["a",', ["a"], "the array has no end"),
        ('["a", ]', ["a"], "a comma before the end"),
        ('["a", nope, "b"]', ["a"], "Expecting value"),
        ('["a", "b', ["a"], "Unterminated string"),
    ],
)
def test_json_arrays_element_by_element(
    monkeypatch: pytest.MonkeyPatch, text: str, elements: list, message: str
) -> None:
    import io

    from megagpt.data import array

    for chunk in (1, 2, 5, 1 << 20):
        monkeypatch.setattr(array, "CHUNK", chunk)
        found = []
        try:
            for element in array_elements(io.BytesIO(text.encode())):
                found.append(element)
            assert not message
        except ValueError as error:
            assert message and message in str(error)
        assert found == elements


def test_the_same_file_twice_counts_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = jsonl(tmp_path / "in.jsonl", ["a"])
    (tmp_path / "link.jsonl").symlink_to(path)
    summary = prepare([path, path, tmp_path / "link.jsonl"], options(tmp_path))
    assert summary.left_out == {"file given more than once": 2}
    assert "link.jsonl: file given more than once; left out" in caplog.text
    with pytest.raises(DamageError, match="in.jsonl: file given more than once"):
        prepare([path, path], options(tmp_path / "strict", strict=True))


def test_literal_end_of_document_stays_text(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "in.jsonl", ["a<|endoftext|>b", "c"])
    for backend in ("tiktoken", "fastokens"):
        folder = tmp_path / backend
        summary = prepare([path], options(folder, backend=backend))
        assert decoded(folder / "out") == ["a<|endoftext|>b", "c"]
        assert summary.documents[0] == 2
        assert summary.notes == {"the literal <|endoftext|> kept as text": 1}


LONG = {
    "spaces": " " * 2_000_000 + "x",
    "newlines": "x" + "\n" * 1_200_000 + "y",
    "mixed": "a \n\t" * 300_000,
    "letters": "a" * 1_000_000,
    "words": "lorem ipsum  dolor\n" * 60_000,
}


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("backend", ["tiktoken", "fastokens"])
def test_long_runs_have_tiktokens_ids(name: str, backend: str) -> None:
    text = LONG[name]
    encoding = load_tokenizer("gpt2")
    ids = Encoder(encoding, backend).encode([text])[0][:-1]
    # tiktoken itself gives up on a run of white space before another character: its ids for the
    # part that ends with the run, which it does take, and for the rest are the reference.
    cut = {"spaces": 1_999_999, "newlines": 1_200_000}.get(name, len(text))
    expected = encoding.encode_ordinary(text[:cut]) + encoding.encode_ordinary(text[cut:])
    assert np.array_equal(ids, expected)


def test_cuts_keep_the_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    encoding = load_tokenizer("gpt2")
    monkeypatch.setattr(encoder_module, "PIECE", 3)
    draw = random.Random(6)
    letters = "ab'sI1. ,\t\n\r\x1c\x85\xa0\u2003\u3000\u00e9\u4e2d"
    for _ in range(3000):
        text = "".join(draw.choices(letters, k=draw.randint(0, 40)))
        parts = list(pieces(text, encoding._pat_str))
        assert "".join(parts) == text
        ids = [token for part in parts for token in encoding.encode_ordinary(part)]
        assert ids == encoding.encode_ordinary(text)


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_large_text_files_are_read_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    texts = ["word \u00e9t\u00e9  more\n" * 5000, "x" * 50_000]
    for name, text in zip("ab", texts, strict=True):
        raw = text.encode()
        data = gzip.compress(raw) if ending else raw
        (tmp_path / f"{name}.txt{ending}").write_bytes(data)
    (tmp_path / f"c.txt{ending}").write_bytes(data[:-9] if ending else raw + b"\xff")
    inputs = [tmp_path / f"{name}.txt{ending}" for name in "acb"]
    monkeypatch.setattr(unit_module, "LARGE_FILE", 100)
    summary = prepare(inputs, options(tmp_path / "large"))
    assert decoded(tmp_path / "large/out") == texts
    assert sum(summary.left_out.values()) == 1
    monkeypatch.setattr(unit_module, "LARGE_FILE", 1 << 30)
    prepare(inputs, options(tmp_path / "whole"))
    assert content(tmp_path / "large/out") == content(tmp_path / "whole/out")


def test_a_text_that_tiktoken_cannot_split_is_left_out(tmp_path: Path) -> None:
    import tiktoken

    gpt2 = load_tokenizer("gpt2")
    other = tiktoken.Encoding(
        "other",
        pat_str=gpt2._pat_str + "|unused",
        mergeable_ranks=gpt2._mergeable_ranks,
        special_tokens=gpt2._special_tokens,
    )
    encoder = Encoder(other)
    assert encoder.backend == "tiktoken" and "fastokens does not do other" in encoder.note
    with pytest.raises(ValueError, match="Regex error"):
        encoder.encode([" " * 1_000_000 + "x"])
    with pytest.raises(UsageError, match="backend fastokens: fastokens does not do other"):
        Encoder(other, "fastokens")


def test_a_fast_backend_that_is_wrong_is_not_used() -> None:
    encoder = Encoder(load_tokenizer("gpt2"), "fastokens")
    right = encoder._fast

    def wrong(texts: list[str]) -> tuple[bytes, bytes]:
        ids, offsets = right([text.replace("I", "J") for text in texts])
        return ids, offsets

    encoder._fast = wrong
    with pytest.raises(DamageError, match="other ids than tiktoken.*--backend tiktoken"):
        encoder.encode(["I am"] * 200)
    encoder.check()
    assert encoder.backend == "tiktoken" and "self-check" in encoder.note
    assert encoder.encode(["I am"])[0].tolist() == [40, 716, 50256]


def run_script(*args: object) -> subprocess.Popen:
    command = [sys.executable, str(SCRIPT), *map(str, args), "--backend", "tiktoken"]
    return subprocess.Popen(
        command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A corpus of a second's work, and its shards from a run in peace."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(7)
    words = [f"w{n}" for n in range(3000)]
    path = jsonl(folder / "in.jsonl", (" ".join(draw.choices(words, k=400)) for _ in range(9000)))
    flags = {"unit_bytes": 1 << 19, "deduplicate": True, "shard_tokens": 700_000}
    prepare([path], options(folder / "calm", **flags))
    return path, content(folder / "calm/out")


def kill_child(path: Path, output: Path, delay_s: float, victim: str) -> bool:
    """Prepare in another process and kill it (or one of its workers) after a while; whether it
    was still at work."""
    code = (
        "import sys; from pathlib import Path\n"
        "from megagpt.data.corpus import Options, prepare\n"
        "prepare([Path(sys.argv[1])], Options(output=Path(sys.argv[2]), workers=2, "
        "backend='tiktoken', unit_bytes=1 << 19, deduplicate=True, shard_tokens=700_000))\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, path, output], env=ENV, stderr=subprocess.PIPE, text=True
    )
    while not (output / ".preparation/plan.json").exists() and child.poll() is None:
        time.sleep(0.01)
    time.sleep(delay_s)
    if victim == "worker":
        import psutil

        workers = psutil.Process(child.pid).children() if child.poll() is None else []
        if workers:
            workers[0].kill()
            message = child.communicate(timeout=60)[1]
            assert "a worker was killed by SIGKILL" in message or child.returncode == 0
    else:
        child.kill()
        child.communicate()
    return child.returncode != 0


def test_kills_at_any_moment_do_not_change_a_byte(
    tmp_path: Path, corpus: tuple[Path, dict[str, bytes]]
) -> None:
    path, calm = corpus
    output = tmp_path / "out"
    draw = random.Random(8)
    kills = 0
    for attempt in range(8):
        victim = "worker" if attempt % 4 == 3 else "parent"
        if not kill_child(path, output, draw.uniform(0, 1.0), victim):
            break
        kills += 1
    flags = {"unit_bytes": 1 << 19, "deduplicate": True, "shard_tokens": 700_000}
    prepare([path], options(tmp_path, **flags))
    assert kills >= 2
    assert content(output) == calm


def test_an_unfinished_output_refuses_other_input(
    tmp_path: Path, corpus: tuple[Path, dict[str, bytes]]
) -> None:
    path, _ = corpus
    assert kill_child(path, tmp_path / "out", 0.0, "parent")
    with pytest.raises(UsageError, match="holds no manifest|did not finish; run the same"):
        read_manifest(tmp_path / "out")
    with pytest.raises(UsageError, match="unfinished preparation of something else .*text_field"):
        prepare([path], options(tmp_path, text_field="body"))
    other = jsonl(tmp_path / "other.jsonl", ["x"])
    flags = {"unit_bytes": 1 << 19, "deduplicate": True, "shard_tokens": 700_000}
    with pytest.raises(UsageError, match="the input files differ or have changed"):
        prepare([other], options(tmp_path, **flags))


def test_stop_by_signal_ends_cleanly_and_continues(
    tmp_path: Path, corpus: tuple[Path, dict[str, bytes]]
) -> None:
    path, _ = corpus
    process = run_script(path, "--output", tmp_path / "out")
    while not (tmp_path / "out/.preparation/plan.json").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 75, errors
    assert "stopped; run the same command again to continue" in errors
    process = run_script(path, "--output", tmp_path / "out")
    out = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "9,000 documents" in out


def test_two_processes_do_not_share_an_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    from megagpt.data import state

    path = jsonl(tmp_path / "in.jsonl", ["x"])
    (tmp_path / "out/.preparation").mkdir(parents=True)
    with (tmp_path / "out/.preparation/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        monkeypatch.setattr(state, "LOCK_WAIT_S", 0.1)
        with pytest.raises(UsageError, match="another process is preparing it"):
            prepare([path], options(tmp_path))


def test_a_full_disk_stops_cleanly_and_continues(
    tmp_path: Path, corpus: tuple[Path, dict[str, bytes]]
) -> None:
    """A tiny file system in a mount namespace of its own; skipped where that is not allowed."""
    path, _ = corpus
    mount = tmp_path / "small"
    mount.mkdir()
    script = f"{sys.executable} {SCRIPT} {path} --output {mount}/out --backend tiktoken"
    steps = (
        f"mount -t tmpfs -o size=3m none {mount} || exit 99; "
        f"{script}; echo first $?; "
        f"mount -o remount,size=100m {mount}; {script}; echo second $?; "
        f"{sys.executable} -c \"from megagpt.data.verify import verify_shards as v; "
        f"print('problems', v('{mount}/out'))\""
    )  # fmt: skip
    unshare = shutil.which("unshare")
    if not unshare:
        pytest.skip("unshare is not installed")
    command = [unshare, "-m"] if os.geteuid() == 0 else [unshare, "-rm"]
    result = subprocess.run(
        [*command, "sh", "-c", steps], env=ENV, capture_output=True, text=True, timeout=200
    )
    if result.returncode == 99 or "unshare" in result.stderr:
        pytest.skip("mounting is not allowed here")
    assert "first 1" in result.stdout, result.stderr
    assert "No space left on device; make space and run the same command" in result.stderr
    assert "Traceback" not in result.stderr
    assert "second 0" in result.stdout and "problems []" in result.stdout


def test_standard_input_that_differs_after_a_kill_is_refused(tmp_path: Path) -> None:
    from megagpt.data.source import Documents

    texts = sample_texts(30)

    def broken() -> list[str]:
        raise KeyboardInterrupt

    def first():
        yield from texts
        yield from broken()

    from megagpt.errors import Stopped

    flags = {"unit_bytes": 200}
    with pytest.raises(Stopped, match="out: stopped; run the same command again"):
        prepare([Documents("mine", first)], options(tmp_path, **flags))
    with pytest.raises(UsageError, match="had read other documents from this input"):
        prepare([Documents("mine", lambda: ["other"] * 30)], options(tmp_path, **flags))
    prepare([Documents("mine", lambda: texts)], options(tmp_path, **flags))
    assert decoded(tmp_path / "out") == texts


def test_input_that_changes_meanwhile_is_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "in.jsonl", sample_texts(30))

    from megagpt.data.source import Documents

    def growing():
        with path.open("a") as file:
            file.write('{"text": "late"}\n')
        yield "x"

    with pytest.raises(UsageError, match="in.jsonl changed while it was read"):
        prepare([path, Documents("mine", growing)], options(tmp_path))
