"""Preparation: tokens are conserved, bytes never depend on workers, formats, filters, resume."""

import bz2
import gzip
import json
import lzma
import os
import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from backports import zstd
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from megagpt.corpus.documents import Documents, find_sources, total_bytes
from megagpt.corpus.manifest import read_manifest
from megagpt.corpus.pipe import prepare
from megagpt.corpus.recipe import PrepareOptions
from megagpt.corpus.unit import plan_units
from megagpt.corpus.verify import verify_shards
from megagpt.errors import UsageError
from megagpt.tokenizer import load_tokenizer

WORDS = (
    "the of and to in a is that for it as was with be by on not he his but \u00e9t\u00e9".split()
)


def decoded(folder: Path) -> list[str]:
    """The documents of a folder as text; its shards are whole."""
    assert verify_shards(folder) == []
    manifest = read_manifest(folder)
    encoding = load_tokenizer(manifest.tokenizer)
    texts = []
    for shard in manifest.shards:
        tokens = np.fromfile(manifest.bin_path(shard), manifest.dtype)
        ends = np.flatnonzero(tokens == manifest.end_of_document)
        assert len(ends) == shard.documents and ends[-1] == len(tokens) - 1
        texts += [encoding.decode(part[part != manifest.end_of_document].tolist())
                  for part in np.split(tokens, ends[:-1] + 1)]  # fmt: skip
    return texts


def content(folder: Path) -> dict[str, bytes]:
    """All files of an output by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def sample_texts(count: int, seed: int = 1) -> list[str]:
    draw = random.Random(seed)
    return [f"{n} " + " ".join(draw.choices(WORDS, k=draw.randint(1, 40))) for n in range(count)]


def jsonl(path: Path, texts: Iterable[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@settings(max_examples=6, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=10),
    workers=st.sampled_from([1, 2, 3]),
    unit_bytes=st.integers(20, 200),
    shard_tokens=st.integers(1, 100),
)
def test_tokens_are_conserved(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str],
    workers: int,
    unit_bytes: int,
    shard_tokens: int,
) -> None:
    folder = tmp_path_factory.mktemp("conserved")
    path = jsonl(folder / "in.jsonl", texts)
    options = PrepareOptions(
        output=folder / "out", workers=workers, unit_bytes=unit_bytes, shard_tokens=shard_tokens
    )
    kept = [text for text in texts if text]
    if not kept:
        with pytest.raises(UsageError, match="no document is left|hold no file"):
            prepare([path], options)
        return
    summary = prepare([path], options)
    assert decoded(folder / "out") == kept
    encoding = load_tokenizer("gpt2")
    expected = sum(len(encoding.encode_ordinary(text)) + 1 for text in kept)
    assert summary.tokens[0] == expected == read_manifest(folder / "out").tokens
    assert summary.text_bytes[0] == sum(len(text.encode()) for text in kept)


@pytest.mark.parametrize("backend", ["tiktoken", "fastokens"])
def test_bytes_do_not_depend_on_workers_or_units(tmp_path: Path, backend: str) -> None:
    path = jsonl(tmp_path / "in.jsonl", sample_texts(300))
    outputs = []
    for workers, unit_bytes in ((1, 1 << 20), (1, 500), (2, 500), (7, 777)):
        folder = tmp_path / f"{workers}-{unit_bytes}" / "web"
        options = PrepareOptions(
            output=folder, workers=workers, unit_bytes=unit_bytes, shard_tokens=1000,
            validation_fraction=0.2, deduplicate=True, backend=backend,
        )  # fmt: skip
        prepare([path], options)
        outputs.append((content(folder), content(folder.with_name("web-validation"))))
    assert all(output == outputs[0] for output in outputs)
    assert len(outputs[0][0]) > 5


def pack(content: bytes, ending: str) -> bytes:
    return {
        "": lambda data: data,
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
        # Two frames in a row, as parallel compressors write them.
        ".zst": lambda data: b"".join(
            zstd.compress(part) for part in (data[: len(data) // 2], data[len(data) // 2 :])
        ),
    }[ending](content)


@pytest.mark.parametrize("ending", ["", ".gz", ".zst", ".bz2", ".xz"])
def test_every_format_and_compression(tmp_path: Path, ending: str) -> None:
    texts = sample_texts(40)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    array = json.dumps([{"text": text} for text in texts], indent=1).encode()
    files = {"a.jsonl": lines, "b.json": array, "c.json": lines, "d.txt": texts[0].encode()}
    for name, data in files.items():
        (tmp_path / (name + ending)).write_bytes(pack(data, ending))
    inputs = [tmp_path / (name + ending) for name in files]
    options = PrepareOptions(output=tmp_path / "out", workers=2, unit_bytes=400)
    prepare(inputs, options)
    assert decoded(tmp_path / "out") == [*texts, *texts, *texts, texts[0]]


@pytest.mark.parametrize("ending", [".gz", ".zst", ".parquet"])
def test_progress_knows_how_far_a_file_is_read(tmp_path: Path, ending: str) -> None:
    texts = [random.Random(n).randbytes(300).hex() for n in range(3000)]
    path = jsonl(tmp_path / "in.jsonl", texts)
    if ending == ".parquet":
        path = tmp_path / "in.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=300)
    else:
        path = tmp_path / f"in.jsonl{ending}"
        path.write_bytes(pack((tmp_path / "in.jsonl").read_bytes(), ending))
    sizes = [unit.size for unit in plan_units(find_sources([path]).sources, 150_000)]
    assert sum(sizes) == path.stat().st_size
    assert len(sizes) >= 9 and max(sizes) < sum(sizes) / 2


def test_no_share_is_told_of_a_size_that_is_not_known(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "in.jsonl", ["one"])
    sources = find_sources([path, Documents("mine", lambda: ["two"])]).sources
    assert total_bytes(sources[:1]) == path.stat().st_size
    assert total_bytes(sources) == total_bytes(find_sources([path, "-"]).sources) == 0


def test_parquet_row_groups_and_other_columns(tmp_path: Path) -> None:
    texts = sample_texts(50)
    table = pyarrow.table({"id": range(50), "body": texts})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    prepare([tmp_path / "a.parquet"], PrepareOptions(output=tmp_path / "out", text_field="body"))
    assert decoded(tmp_path / "out") == texts


def test_folders_globs_and_python_documents_keep_their_order(tmp_path: Path) -> None:
    (tmp_path / "in/sub").mkdir(parents=True)
    for name in ("b.txt", "a.txt", "sub/c.txt", "note.xyz", ".hidden.txt"):
        (tmp_path / "in" / name).write_text(name)
    inputs = [
        Documents("mine", lambda: iter(["first", "second"])),
        tmp_path / "in",
        str(tmp_path / "in/s*/*.txt"),
    ]
    summary = prepare(inputs, PrepareOptions(output=tmp_path / "out", unit_bytes=1))
    assert decoded(tmp_path / "out") == ["first", "second", "a.txt", "b.txt", "sub/c.txt"]
    assert summary.left_out == {"file given more than once": 1}
    assert summary.notes["files of folders with an unknown ending"] == 1


def test_manifest_says_where_the_tokens_come_from(tmp_path: Path) -> None:
    import hashlib

    path = jsonl(tmp_path / "in.jsonl", sample_texts(30))
    prepare([path], PrepareOptions(output=tmp_path / "out", unit_bytes=100))
    manifest = read_manifest(tmp_path / "out")
    data = path.read_bytes()
    assert manifest.sources == (
        {"path": str(path), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()},
    )
    assert manifest.totals["documents"] == 30


def test_a_second_run_says_that_it_is_finished(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "in.jsonl", sample_texts(30))
    options = PrepareOptions(output=tmp_path / "out", validation_fraction=0.5)
    first = prepare([path], options)
    before = content(tmp_path / "out")
    again = prepare([path], options)
    assert again.finished_before and "finished already: 30 documents" in again.text()
    assert again.tokens == first.tokens
    assert content(tmp_path / "out") == before
    os.utime(path, ns=(2**62, 2**62))  # newer than the manifest, but the same content
    assert prepare([path], options).finished_before


def test_an_output_with_another_corpus_is_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "in.jsonl", sample_texts(30))
    other = jsonl(tmp_path / "other.jsonl", sample_texts(31))
    output = tmp_path / "out"
    prepare([path], PrepareOptions(output=output))
    with pytest.raises(UsageError, match="already holds another corpus .the input files differ"):
        prepare([other], PrepareOptions(output=output))
    with pytest.raises(UsageError, match="deduplicate was False, now it is True"):
        prepare([path], PrepareOptions(output=output, deduplicate=True))
    with pytest.raises(UsageError, match="another corpus .tokenizer was"):
        prepare([path], PrepareOptions(output=output, tokenizer="bytes"))
    same_size = path.read_text().replace("the", "THE")
    path.write_text(same_size)
    os.utime(path, ns=(2**62, 2**62))
    with pytest.raises(UsageError, match="input files differ or have changed"):
        prepare([path], PrepareOptions(output=output))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/x.bin").touch()
    with pytest.raises(UsageError, match="already holds another corpus .x.bin"):
        prepare([path], PrepareOptions(output=tmp_path / "foreign"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation_fraction": 2}, "validation_fraction = 2: must lie between 0 and 1"),
        ({"near_duplicates": -1}, "near_duplicates = -1: must lie"),
        ({"format": "csv"}, "format csv: must be one of text, jsonl"),
        ({"backend": "magic"}, "backend magic: must be one of auto"),
        ({"backend": "fastokens", "tokenizer": "bytes"}, ""),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    path = jsonl(tmp_path / "in.jsonl", ["x"])
    options = PrepareOptions(output=tmp_path / "out", **changes)
    if not message:
        assert prepare([path], options).backend == "bytes"
        return
    with pytest.raises(UsageError, match=message):
        prepare([path], options)


def test_wrong_inputs_are_refused(tmp_path: Path) -> None:
    options = PrepareOptions(output=tmp_path / "out")
    (tmp_path / "a.xyz").write_text("x")
    with pytest.raises(UsageError, match="nothing.txt: no such file or folder"):
        prepare([tmp_path / "nothing.txt"], options)
    with pytest.raises(UsageError, match="a.xyz: its ending is none of .*--format"):
        prepare([tmp_path / "a.xyz"], options)
    with pytest.raises(UsageError, match="the inputs hold no file"):
        prepare([tmp_path], options)
    assert prepare(
        [tmp_path / "a.xyz"], PrepareOptions(output=tmp_path / "out", format="text")
    ).tokens


def test_tokenizer_file_travels_with_the_shards(tmp_path: Path) -> None:
    from megagpt.tokenizer.json import write_tokenizer_file

    source = tmp_path / "mine.json"
    write_tokenizer_file(source, [("t", "h"), ("th", "e")], "<|endoftext|>")
    path = jsonl(tmp_path / "in.jsonl", sample_texts(30))
    summary = prepare([path], PrepareOptions(output=tmp_path / "out", tokenizer=str(source)))
    assert summary.backend == "fastokens"
    source.unlink()
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.tokenizer_name, manifest.vocab_size) == ("tokenizer.json", 259)
    assert decoded(tmp_path / "out") == sample_texts(30)


def test_large_vocabularies_become_int32(tmp_path: Path) -> None:
    from megagpt.tokenizer.gpt2 import byte_letters
    from megagpt.tokenizer.json import write_tokenizer_file

    letters = list(byte_letters().values())
    pairs = [(a, b) for a in letters for b in letters]
    write_tokenizer_file(tmp_path / "big.json", pairs, "<|endoftext|>")
    path = jsonl(tmp_path / "in.jsonl", sample_texts(30))
    prepare([path], PrepareOptions(output=tmp_path / "out", tokenizer=str(tmp_path / "big.json")))
    assert read_manifest(tmp_path / "out").dtype == np.int32
    assert decoded(tmp_path / "out") == sample_texts(30)
