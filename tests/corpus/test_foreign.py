"""Files of others are recognised by their bytes; what is unknown or damaged is refused."""

import gzip
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megagpt.cli import main
from megagpt.corpus.adopt import import_shards
from megagpt.corpus.documents import Documents
from megagpt.corpus.manifest import read_manifest
from megagpt.corpus.pipe import prepare
from megagpt.corpus.recipe import PrepareOptions
from megagpt.corpus.verify import verify_shards
from megagpt.errors import DamageError, Stopped, UsageError
from tests.corpus.test_adopt import END, TEXTS, ids, llmc, megatron
from tests.corpus.test_prepare import content, decoded
from tests.corpus.test_shards import flipped

AFTER = [token for text in TEXTS for token in [*ids(text), END]]
BEFORE = [token for text in TEXTS for token in [END, *ids(text)]]
REAL = ids("The quick brown fox jumps over the lazy dog and runs away.\n" * 100)


def as_npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def table(offsets: list[int]) -> bytes:
    return struct.pack(f"<I{len(offsets)}I", len(offsets) - 1, *offsets).ljust(offsets[-1], b"\1")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("edu.npy", as_npy(np.array(BEFORE, np.uint16))),
        ("wide.npy", as_npy(np.array(AFTER, np.int64))),
        ("train.bin", np.array(AFTER, "<u2").tobytes()),
        ("llama.bin", np.array([20240801, 7, len(BEFORE), *[0] * 253, *BEFORE], "<u4").tobytes()),
    ],
)
def test_known_formats_are_taken(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    import_shards([tmp_path], tmp_path / "out")
    assert decoded(tmp_path / "out") == TEXTS


@pytest.mark.parametrize(
    ("content", "look"),
    [
        (np.array(AFTER, "<i4").tobytes(), "32-bit numbers"),
        (np.array(AFTER, "<i8").tobytes(), "64-bit numbers"),
        (np.array(AFTER, ">u4").tobytes(), "big-endian numbers"),
        (np.arange(99, dtype=">u2").tobytes(), "big-endian numbers, or UTF-16"),
        ("Without a mark, the other way. ".encode("utf-16-be"), "big-endian numbers, or UTF-16"),
        (np.linspace(-3, 3, 500, dtype="<f4").tobytes(), "floating-point numbers of 4 bytes"),
        (np.linspace(-3, 3, 500, dtype="<f8").tobytes(), "floating-point numbers of 8 bytes"),
        (bytes(4096), "a file that was laid out and never written"),
        (b"Some text\nof two lines.\n", "text"),
        ("\u00fcber".encode() * 2000, "text"),
        ("\u00fcber und \u00fcber\n".encode("latin-1") * 90, "text"),
        (b'{"text": "a"}\n', "text"),
        ("UTF-16".encode("utf-16"), "UTF-16 text"),
        (gzip.compress(b"x", mtime=0), "a gzip file"),
        (b"PK\3\4" + bytes(20), "a zip archive"),
        (b"\x80\2\x8a" + bytes(9), "a pickle"),
        (table([60, 64, 70]), "a shard of 2 samples of Mosaic's streaming or litdata"),
        (table([24, 40, 41, 300]), "a shard of 3 samples of"),
        (as_npy(np.ones((2, 3), np.uint16)), "an array of 2x3 uint16"),
        (as_npy(np.ones(3, np.float32)), "an array of 3 float32"),
        (as_npy(np.ones(3, ">u2")), "an array of 3 >u2"),
        (
            np.arange(2000, dtype="<u2").__mod__(77).tobytes(),
            r"ids of characters .* below 77\), not",
        ),
        (
            as_npy(np.arange(2000, dtype=np.int32) % 256),
            r"ids of characters or bytes \(all below 256\)",
        ),
        ("UTF-16 without a mark. ".encode("utf-16-le") * 60, "ids of characters or bytes"),
    ],
)
def test_what_is_unknown_is_refused_with_what_it_looks_like(
    tmp_path: Path, content: bytes, look: str
) -> None:
    path = tmp_path / "train.bin"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=f"train.bin: looks like {look}.*--raw uint16"):
        import_shards([path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["a.parquet", "a.txt", "a.tar", "a.ds", "m.idx", "a.bin.gz", "a"])
def test_what_is_not_called_bin_is_no_bare_tokens(tmp_path: Path, name: str) -> None:
    np.array(AFTER, "<u2").tofile(tmp_path / name)
    look = f"a {Path(name).suffix} file" if "." in name else "a file that is not called .bin"
    with pytest.raises(UsageError, match=f"{name}: looks like {look}"):
        import_shards([tmp_path / name], tmp_path / "out")
    assert import_shards([tmp_path / name], tmp_path / "out", raw="uint16")[0].documents == 3


def test_neighbours_say_what_a_file_is(tmp_path: Path) -> None:
    path = tmp_path / "train.bin"
    np.array(REAL, "<u2").tofile(path)
    for name, look in (("train.bin.index", "datatrove"), ("meta.pkl", "characters: meta.pkl")):
        # Unpickling it would raise.
        (tmp_path / name).write_bytes(b"cos\nabort\n(tR.")
        with pytest.raises(UsageError, match=f"looks like .*{look}.*beside it"):
            import_shards([path], tmp_path / "out")
        (tmp_path / name).unlink()


def test_text_of_real_ids_is_taken_for_nothing_else(tmp_path: Path) -> None:
    for start in range(40):
        np.array(REAL[start : start + 20 * start + 1], "<u2").tofile(tmp_path / "a.bin")
        [made] = import_shards([tmp_path / "a.bin"], tmp_path / f"out{start}")
        assert made.tokens == 20 * start + 2


@pytest.mark.parametrize("kind", ["uint16", "int32", "uint32", "int64"])
def test_raw_takes_a_file_as_the_caller_says(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.bin"
    np.array([1, *[0] * 9, END, 2, END], kind).tofile(path)
    (tmp_path / "meta.pkl").touch()
    import_shards([path], tmp_path / "out", raw=kind)
    found = np.fromfile(tmp_path / "out/out_00000.bin", "<u2")
    assert found.tolist() == [1, *[0] * 9, END, 2, END]
    path.write_bytes(b"abc")
    with pytest.raises(DamageError, match=f"3 bytes are no {kind} tokens"):
        import_shards([path], tmp_path / "x", raw=kind)


def test_damaged_files_of_known_formats(tmp_path: Path) -> None:
    good = as_npy(np.array(AFTER, np.uint16))
    for name, raw, message in (
        ("a.npy", good[:-2], "not a whole .npy file"),
        ("a.npy", good + b"\0\0", ".* bytes, its header means"),
        ("a.npy", good[:20], "not a whole .npy file"),
        ("a.npy", good.replace(b",)", b", "), "not a whole .npy file"),
        ("a.npy", as_npy(np.array([{}])), "not a whole .npy file .Object arrays|not a whole .npy"),
        ("a.bin", b"", "0 bytes are no uint16 tokens"),
        ("a.bin", llmc(tmp_path / "l", BEFORE).read_bytes()[:100], "not a whole llm.c shard"),
        ("a.bin", llmc(tmp_path / "l", []).read_bytes(), "not a whole llm.c shard"),
        ("a.bin", flipped(llmc(tmp_path / "l", BEFORE).read_bytes(), 4000), "not a whole llm.c"),
    ):
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(DamageError, match=f"{name}: {message}"):
            import_shards([tmp_path / name], tmp_path / "out")


def test_tokens_below_zero_are_refused(tmp_path: Path) -> None:
    prefix = megatron(tmp_path, [[1, -5, END]], [0, 1], "<i4")
    with pytest.raises(UsageError, match="holds token -5, outside the 50257 of gpt2"):
        import_shards([prefix], tmp_path / "out")
    with pytest.raises(UsageError, match="something else .the input files differ or have changed"):
        np.array([1, 5, END], "<i4").tofile(tmp_path / "m.bin")
        import_shards([prefix], tmp_path / "out")


def test_indexes_that_contradict_themselves(tmp_path: Path) -> None:
    sequences = [[*ids(text), END] for text in TEXTS]
    for bounds, message in (
        ([0, 1, 2], "document starts do not cover"),
        ([0, 2, 1, 3], "document 2 starts before the one in front of it"),
        ([0, 0, 2, 3], "document 0 has no sequence, though others have several"),
        ([0, 2, 3], None),
    ):
        prefix = megatron(tmp_path, sequences, bounds)
        if message is None:
            import_shards([prefix], tmp_path / "out")
            continue
        with pytest.raises(DamageError, match=f"m.idx: its {message}|m.idx: {message}"):
            import_shards([prefix])
    path = tmp_path / "m.idx"
    head = path.read_bytes()[:34]
    places = struct.pack("<3i3q4q", 3, 4, 2, 0, 6, -14, 0, 1, 2, 3)
    path.write_bytes(head[:18] + struct.pack("<QQ", 3, 4) + places)
    with pytest.raises(DamageError, match="byte offsets do not follow .* first at sequence 2"):
        import_shards([prefix], tmp_path / "new")
    shutil.rmtree(tmp_path / "new")
    path.write_bytes(head[:17] + b"\7" + struct.pack("<QQ", 3, 4) + places)
    with pytest.raises(DamageError, match="its tokens are float32"):
        import_shards([prefix])
    path.write_bytes(head[:18] + struct.pack("<QQq", 0, 1, 0))
    (tmp_path / "m.bin").write_bytes(b"")
    for output in (None, tmp_path / "new"):
        with pytest.raises(DamageError, match="it lists no documents"):
            import_shards([prefix], output)


def test_an_end_that_is_missing_here_and_there_is_damage(tmp_path: Path) -> None:
    sequences = [[*ids(text), END] for text in TEXTS]
    sequences[1] = sequences[1][:-1]
    with pytest.raises(DamageError, match="1 of 3 documents do not end with .* is document 1: "):
        import_shards([megatron(tmp_path, sequences, [0, 1, 2, 3])], tmp_path / "out")


def test_empty_documents_of_megatron_are_left_out(tmp_path: Path) -> None:
    prefix = megatron(tmp_path, [[*ids(text), END] for text in TEXTS], [0, 1, 1, 2, 3])
    with pytest.raises(UsageError, match="a document is empty; convert it with --output"):
        import_shards([prefix])
    import_shards([prefix], tmp_path / "out")
    assert decoded(tmp_path / "out") == TEXTS


# --- splits -------------------------------------------------------------------------------------


def test_splits_in_names_become_splits(tmp_path: Path) -> None:
    for name, text in (("train", "a b"), ("web_val_000000", "c d"), ("x-test", "e f")):
        np.array([*ids(text), END], "<u2").tofile(tmp_path / f"{name}.bin")
    made = import_shards([tmp_path], tmp_path / "out/web")
    names = ["web", "web-validation", "web-test"]
    assert [manifest.folder.name for manifest in made] == names
    assert [read_manifest(m.folder).split.name for m in made] == ["train", "validation", "test"]
    assert [decoded(m.folder) for m in made] == [["a b"], ["c d"], ["e f"]]
    assert all(verify_shards(manifest.folder) == [] for manifest in made)
    [alone] = import_shards([tmp_path / "web_val_000000.bin"], tmp_path / "alone")
    assert (alone.folder.name, alone.split.name) == ("alone", "validation")


def test_pairs_of_several_splits_in_one_folder_are_refused(tmp_path: Path) -> None:
    for name in ("a_text_document", "a_valid_text_document"):
        megatron(tmp_path, [[*ids(name), END]], [0, 1])
        for ending in ("bin", "idx"):
            (tmp_path / f"m.{ending}").rename(tmp_path / f"{name}.{ending}")
    with pytest.raises(UsageError, match="several splits .a_text_.*valid.*--output DIR.*or move"):
        import_shards([tmp_path])
    assert len(import_shards([tmp_path], tmp_path / "out")) == 2


def test_a_file_given_twice_is_refused(tmp_path: Path) -> None:
    np.array(AFTER, "<u2").tofile(tmp_path / "train.bin")
    with pytest.raises(UsageError, match="train.bin is given twice"):
        import_shards([tmp_path, tmp_path / "train.bin"], tmp_path / "out")


def test_the_assumed_tokenizer_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.array(AFTER, "<u2").tofile(tmp_path / "train.bin")
    arguments = ["data", "import", str(tmp_path / "train.bin"), "--output", str(tmp_path / "o")]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "tokenizer: gpt2 is assumed; --tokenizer names another" in out
    assert "o: train split, 3 documents, 9 tokens of gpt2" in out
    arguments[-1] += "2"
    assert main([*arguments, "--tokenizer", "gpt2"]) == 0
    assert "is assumed" not in capsys.readouterr().out


# --- what is unfinished ----------------------------------------------------------------------


def unfinished(folder: Path) -> None:
    for inputs in ([folder], [next(folder.glob("*.bin"))]):
        with pytest.raises(UsageError, match="did not finish left these files; run its command"):
            import_shards(inputs)
    with pytest.raises(UsageError, match="its preparation did not finish; run the same command"):
        read_manifest(folder)


def test_a_killed_import_starts_over_and_is_never_adopted(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    for name in ("train", "val"):
        tokens = draw.integers(300, 50000, 3_000_000)
        tokens[::50] = END
        tokens.astype("<u2").tofile(tmp_path / f"{name}.bin")
    command = [sys.executable, "-m", "megagpt", "data", "import", str(tmp_path)]
    command += ["--shard-tokens", "50000", "--output", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not any(tmp_path.glob("out-validation/*.bin")):
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for folder in (tmp_path / "out", tmp_path / "out-validation"):
        unfinished(folder)
    with pytest.raises(UsageError, match="unfinished preparation of something else .shard_tokens"):
        import_shards([tmp_path], tmp_path / "out")
    (tmp_path / "w").mkdir()
    for folder, again in (("out", tmp_path / "out"), ("w/out", tmp_path / "w/out")):
        import_shards([tmp_path], again, shard_tokens=50_000)
        assert verify_shards(tmp_path / folder) == []
    for ending in ("", "-validation"):
        assert content(tmp_path / f"out{ending}") == content(tmp_path / f"w/out{ending}")


def test_a_preparation_that_stopped_is_never_adopted(tmp_path: Path) -> None:
    def texts() -> list[str]:
        if os.environ.get("STOP"):
            yield from (f"document {number}" for number in range(400))
            raise KeyboardInterrupt
        yield from (f"document {number}" for number in range(600))

    options = PrepareOptions(
        output=tmp_path / "out", workers=1, validation_fraction=0.5, unit_bytes=100, shard_tokens=99
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STOP", "1")
        with pytest.raises(Stopped):
            prepare([Documents("texts", texts)], options)
    for folder in (tmp_path / "out", tmp_path / "out-validation"):
        unfinished(folder)
    prepare([Documents("texts", texts)], options)
    for folder in (tmp_path / "out", tmp_path / "out-validation"):
        assert not (folder / ".preparation").exists()
        assert verify_shards(folder) == []
    assert json.loads((tmp_path / "out/manifest.json").read_text())["sha256"]
