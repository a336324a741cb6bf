"""The shard format: index, manifest, writer."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.corpus.manifest import CorpusManifest, Shard, read_manifest, write_manifest
from megagpt.corpus.shards import ShardWriter, index_bytes, read_index
from megagpt.corpus.verify import verify_shards
from megagpt.errors import DamageError, UsageError
from megagpt.files import sealed_json
from megagpt.tokenizer import token_dtype


def write_folder(
    folder: Path, documents: list[list[int]], shard_tokens: int = 100
) -> CorpusManifest:
    """A folder of documents of tokens below 256; 256 is END-OF-DOCUMENT."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(folder, 257, shard_tokens=shard_tokens)
    for document in documents:
        tokens = np.array([*document, 256], np.uint16)
        writer.add(tokens, np.array([len(tokens)]))
    manifest = CorpusManifest(
        folder=folder,
        tokenizer_name="bytes",
        vocab_size=257,
        end_of_document=256,
        fingerprint="",
        dtype=np.dtype("<u2"),
        shards=tuple(writer.close()),
    )
    write_manifest(manifest)
    return manifest


def flipped(content: bytes, bit: int) -> bytes:
    place, mask = bit // 8, 1 << bit % 8
    return content[:place] + bytes([content[place] ^ mask]) + content[place + 1 :]


def test_index_bytes_are_megatrons(tmp_path: Path) -> None:
    content = index_bytes(np.array([3, 2]), np.dtype("<u2"))
    assert content == bytes.fromhex(
        "4d4d4944494458 0000 0100000000000000 08 0200000000000000 0300000000000000"
        "03000000 02000000 0000000000000000 0600000000000000"
        "0000000000000000 0100000000000000 0200000000000000"
    )
    path = tmp_path / "a.idx"
    path.write_bytes(content)
    index = read_index(path)
    assert index.dtype == np.uint16
    assert index.sizes.tolist() == [3, 2]
    assert index.pointers.tolist() == [0, 6]
    assert index.documents.tolist() == [0, 1, 2]


def test_offsets_do_not_overflow(tmp_path: Path) -> None:
    path = tmp_path / "a.idx"
    path.write_bytes(index_bytes(np.array([2**31 - 1] * 3, np.int32), np.dtype("<i4")))
    assert read_index(path).pointers.tolist() == [0, 4 * (2**31 - 1), 8 * (2**31 - 1)]


def test_token_dtype_follows_the_vocabulary() -> None:
    assert token_dtype(1 << 16) == np.uint16
    assert token_dtype((1 << 16) + 1) == np.int32


def test_damaged_indexes_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.idx"
    with pytest.raises(DamageError, match="a.idx: cannot be read .No such file"):
        read_index(path)
    good = index_bytes(np.array([3, 2]), np.dtype("<u2"))
    for content, message in (
        (b"", "wrong magic"),
        (b"x" * 60, "wrong magic"),
        (good[:9] + b"\2" + good[10:], "version 2, dtype code 8"),
        (good[:17] + b"\x09" + good[18:], "version 1, dtype code 9"),
        (good[:-1], "cut short or overwritten"),
    ):
        path.write_bytes(content)
        with pytest.raises(DamageError, match=message):
            read_index(path)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 255), max_size=30), max_size=20), st.integers(1, 60))
def test_tokens_are_conserved(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], shard_tokens: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    manifest = write_folder(folder, documents, shard_tokens)
    found = []
    for shard in manifest.shards:
        tokens = np.fromfile(manifest.bin_path(shard), manifest.dtype)
        index = read_index(manifest.index_path(shard))
        for size, pointer in zip(index.sizes, index.pointers, strict=True):
            start = int(pointer) // 2
            found.append(tokens[start : start + size].tolist())
        assert shard.tokens == len(tokens)
        assert shard.tokens <= shard_tokens or shard.documents == 1
    assert found == [[*document, 256] for document in documents]
    assert verify_shards(folder) == []


def test_batches_of_documents_give_the_same_shards(tmp_path: Path) -> None:
    documents = [[i] * (i % 7 if i % 11 else 40) for i in range(60)]
    one = write_folder(tmp_path / "one" / "web", documents, 23)
    folder = tmp_path / "two" / "web"
    folder.mkdir(parents=True)
    writer = ShardWriter(folder, 257, shard_tokens=23)
    for start in range(0, 60, 13):
        batch = [[*document, 256] for document in documents[start : start + 13]]
        tokens = np.concatenate([np.array(document, np.uint16) for document in batch])
        writer.add(tokens, np.array([len(document) for document in batch]))
    assert tuple(writer.close()) == one.shards


@pytest.mark.parametrize("flushed", range(0, 61, 15))
@pytest.mark.parametrize("state", ["torn", "renamed"])
def test_a_killed_writer_goes_on(tmp_path: Path, flushed: int, state: str) -> None:
    batches = [np.array([i] * (i % 7) + [256], np.uint16) for i in range(60)]

    def writer(folder: Path, finished: list[Shard]) -> ShardWriter:
        folder.mkdir(exist_ok=True)
        return ShardWriter(folder, 257, name="web", shard_tokens=23, finished=finished)

    whole = writer(tmp_path / "whole", [])
    for batch in batches:
        whole.add(batch, np.array([len(batch)]))
    killed = writer(tmp_path / "killed", [])
    for batch in batches[:flushed]:
        killed.add(batch, np.array([len(batch)]))
    killed.flush()
    finished = list(killed.shards)
    if state == "renamed":
        killed.close()
    else:
        for batch in batches[flushed : flushed + 2]:
            killed.add(batch * 0, np.array([len(batch)]))
    again = writer(tmp_path / "killed", finished)
    for batch in batches[:flushed]:
        again.skip(np.array([len(batch)]))
    for batch in batches[flushed:]:
        again.add(batch, np.array([len(batch)]))
    assert again.close() == whole.close()
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "killed" / path.name).read_bytes()


def test_a_finished_shard_must_match_what_comes_again(tmp_path: Path) -> None:
    done = Shard("web_00000", 5, 2, 10, "", "")
    writer = ShardWriter(tmp_path, 257, name="web", shard_tokens=5, finished=[done])
    writer.skip(np.array([2]))
    with pytest.raises(DamageError, match="wrote 2 documents there, now there are 1"):
        writer.skip(np.array([4]))
    writer = ShardWriter(tmp_path, 257, name="web", shard_tokens=5)
    writer.skip(np.array([2]))
    with pytest.raises(DamageError, match="web_00000.bin.tmp: shorter than the 4 bytes"):
        writer.add(np.array([1, 256], np.uint16), np.array([2]))


def test_writer_refuses_what_the_index_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="shard size 0: must be at least 1 token"):
        ShardWriter(tmp_path, 257, shard_tokens=0)
    writer = ShardWriter(tmp_path, 257)
    huge = np.broadcast_to(np.uint16(1), (2**31,))
    with pytest.raises(UsageError, match="a document of 2147483648 tokens"):
        writer.add(huge, np.array([2**31]))


def test_manifest_reads_back(tmp_path: Path) -> None:
    written = write_folder(tmp_path / "web", [[1, 2], [3]])
    read = read_manifest(tmp_path / "web")
    assert read == written
    assert (read.tokens, read.documents) == (5, 2)
    assert read.tokenizer == "bytes"
    assert [shard.name for shard in read.shards] == ["web_00000"]


def test_missing_manifest_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist; prepare a corpus"):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="holds no manifest.json"):
        read_manifest(tmp_path)
    (tmp_path / "a.bin").touch()
    with pytest.raises(UsageError, match="megagpt data import"):
        read_manifest(tmp_path)
    (tmp_path / ".preparation").mkdir()
    with pytest.raises(UsageError, match="did not finish; run the same command again"):
        read_manifest(tmp_path)


def test_broken_manifests_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "web"
    write_folder(folder, [[1, 2], [3]])
    path = folder / "manifest.json"
    good = json.loads(path.read_text())

    def broken(message: str, kind: type[Exception] = DamageError, **changes: object) -> None:
        path.write_text(sealed_json(good | changes))
        with pytest.raises(kind, match=message):
            read_manifest(folder)

    shard = good["shards"][0]
    broken("manifest.json: format 3, this megagpt reads formats 1 and 2", UsageError, format=3)
    broken("KeyError: 'name'", tokenizer={})
    broken("unexpected keyword argument 'x'", shards=[shard | {"x": 1}])
    broken("dtype 'int64' is neither uint16 nor int32", dtype="int64")
    broken("no key of a manifest is called 'x'", x=1)
    broken("it lists a shard twice", shards=[shard, shard])
    broken("'../t.json' is neither", tokenizer=good["tokenizer"] | {"name": "../t.json"})
    broken("OverflowError", tokenizer=good["tokenizer"] | {"vocab_size": float("inf")})
    broken("dtype int32 does not follow from 257", dtype="int32")
    broken("9 bytes are not 5 tokens", shards=[shard | {"bytes": 9}])
    broken("is not a file name", shards=[shard | {"name": "../x"}])
    broken("totals say 7 tokens, the shards hold 5", totals={"tokens": 7})
    broken(
        "end_of_document 257 is outside the vocabulary",
        tokenizer=good["tokenizer"] | {"end_of_document": 257},
    )
    for content, message in (
        ("{", "not a manifest that can be believed .JSONDecodeError"),
        ("[" * 100_000, "RecursionError"),
        ('"sha256"', "AttributeError"),
        (json.dumps(good), "its checksum is not that of its content: damaged or edited"),
    ):
        path.write_text(content)
        with pytest.raises(DamageError, match=message):
            read_manifest(folder)


def test_every_flipped_bit_of_a_manifest_is_found(tmp_path: Path) -> None:
    write_folder(tmp_path, [[1, 2], [3]])
    path = tmp_path / "manifest.json"
    good = path.read_bytes()
    for bit in range(8 * len(good)):
        path.write_bytes(flipped(good, bit))
        with pytest.raises((DamageError, UsageError), match="manifest.json"):
            read_manifest(tmp_path)


def test_a_manifest_of_an_earlier_version_stays_valid(tmp_path: Path) -> None:
    written = write_folder(tmp_path, [[1, 2], [3]])
    path = tmp_path / "manifest.json"
    tree = json.loads(path.read_text())
    del tree["sha256"], tree["tokenizer"]["sha256"]
    # As they wrote it, with the name of an input that is not UTF-8.
    tree["sources"] = [{"path": "caf\udce9.txt"}]
    path.write_bytes(json.dumps(tree, ensure_ascii=False).encode("utf-8", "surrogateescape"))
    read = read_manifest(tmp_path)
    assert read == replace(written, sealed=False, sources=({"path": "caf\udce9.txt"},))
    write_manifest(read)
    assert read_manifest(tmp_path) == replace(read, sealed=True)
