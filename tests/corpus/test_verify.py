"""Every kind of damage to shards is found and named."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megagpt.corpus.documents import Documents
from megagpt.corpus.manifest import CorpusManifest, new_manifest, write_manifest
from megagpt.corpus.pipe import prepare
from megagpt.corpus.recipe import PrepareOptions
from megagpt.corpus.shards import index_bytes
from megagpt.corpus.verify import verify_files, verify_shards
from megagpt.errors import DamageError
from megagpt.files import file_sha256
from megagpt.order.windows import TokenWindows
from megagpt.tokenizer import load_tokenizer
from megagpt.tokenizer.json import write_tokenizer_file
from tests.corpus.test_shards import write_folder
from tests.lib.corpus import edit_manifest

DOCUMENTS = [[1, 2, 3], [], [4] * 20, [5, 6]]


@pytest.fixture
def manifest(tmp_path: Path) -> CorpusManifest:
    return write_folder(tmp_path / "web", DOCUMENTS, shard_tokens=10)


def resign(manifest: CorpusManifest) -> None:
    """Write the manifest again with the digests of the files as they are now."""
    shards = [
        replace(
            shard,
            sha256=file_sha256(manifest.bin_path(shard)),
            index_sha256=file_sha256(manifest.index_path(shard)),
        )
        for shard in manifest.shards
    ]
    write_manifest(replace(manifest, shards=tuple(shards)))


def test_whole_shards_have_no_problems(manifest: CorpusManifest) -> None:
    read: list[int] = []
    assert verify_shards(manifest.folder, read.append) == []
    size = sum(path.stat().st_size for path in manifest.folder.glob("*_*"))
    assert sum(read) == size
    assert verify_files(manifest) == []


def test_every_flipped_byte_is_found(manifest: CorpusManifest) -> None:
    for path in sorted(manifest.folder.glob("*_*")):
        good = path.read_bytes()
        for place in range(len(good)):
            path.write_bytes(good[:place] + bytes([good[place] ^ 0x40]) + good[place + 1 :])
            for problems in (verify_files(manifest), verify_shards(manifest.folder)):
                assert problems and path.name in problems[0], (path, place)
        path.write_bytes(good)


def test_hashing_can_be_limited_to_some_shards(manifest: CorpusManifest) -> None:
    first, last = manifest.shards[0], manifest.shards[-1]
    manifest.bin_path(first).write_bytes(bytes(first.bytes))
    assert verify_files(manifest, [last.name]) == []
    assert "web_00000.bin: sha256" in verify_files(manifest, [first.name])[0]


def test_missing_short_and_strange_files(manifest: CorpusManifest) -> None:
    first, second = manifest.shards[:2]
    manifest.index_path(first).unlink()
    manifest.bin_path(second).write_bytes(b"\0\0")
    for ending in ("bin", "idx"):
        (manifest.folder / f"web_00009.{ending}").touch()
    # The one of a shard without a mask is as strange as that of no shard.
    for name in ("web_00000.mask", "web_00009.mask"):
        (manifest.folder / name).touch()
    problems = verify_shards(manifest.folder)
    assert [Path(problem.split(": ")[0]).name for problem in problems] == [
        "web_00000.mask", "web_00009.bin", "web_00009.idx", "web_00009.mask", "web_00000.idx",
        "web_00001.bin",
    ]  # fmt: skip
    assert all("not in the manifest" in problem for problem in problems[:4])
    assert "missing, though the manifest beside it lists it" in problems[4]
    assert "has 2 bytes, the manifest beside it says 42" in problems[5]


def test_content_that_its_checksums_approve(manifest: CorpusManifest) -> None:
    """Files written wrong from the start: only reading the tokens shows it."""
    shard = manifest.shards[0]
    good = np.fromfile(manifest.bin_path(shard), manifest.dtype)

    def problem(tokens: list[int]) -> str:
        np.array(tokens, manifest.dtype).tofile(manifest.bin_path(shard))
        resign(manifest)
        return "\n".join(verify_shards(manifest.folder))

    assert good.tolist() == [1, 2, 3, 256, 256]
    assert problem([1, 2, 3, 256, 256]) == ""
    assert "1 tokens outside the vocabulary of 257, the first at token 1" in problem(
        [1, 257, 3, 256, 256]
    )
    assert "1 documents do not end with END-OF-DOCUMENT (256), the first is document 1" in problem(
        [1, 2, 3, 256, 7]
    )
    assert "3 END-OF-DOCUMENT tokens for 2 documents" in problem([256, 2, 3, 256, 256])


def test_indexes_that_contradict_the_manifest(manifest: CorpusManifest) -> None:
    path = manifest.index_path(manifest.shards[0])
    kind = np.dtype("<u2")
    good = index_bytes(np.array([4, 1]), kind)
    for content, message in (
        (index_bytes(np.array([4, 1]), np.dtype("<i4")), "dtype int32, the manifest says uint16"),
        (index_bytes(np.array([5]), kind), "1 documents, the manifest says 2"),
        (index_bytes(np.array([4, 2]), kind), "lengths add up to 12 bytes, its .bin has 10"),
        (good[:42] + b"\2" + good[43:], "byte offsets do not follow"),
        (good[:-8] + b"\1" + good[-7:], "document starts do not cover its sequences"),
        (good[:-8], "cut short"),
    ):
        path.write_bytes(content)
        resign(manifest)
        assert message in "\n".join(verify_shards(manifest.folder))


@pytest.fixture
def with_tokenizer(tmp_path: Path) -> Path:
    """A corpus whose tokenizer is a file."""
    source = tmp_path / "mine.json"
    write_tokenizer_file(source, [("t", "h"), ("th", "e")], "<|endoftext|>")
    texts = Documents("texts", lambda: ["the cat", "then"])
    prepare([texts], PrepareOptions(output=tmp_path / "out", tokenizer=str(source), workers=1))
    return tmp_path / "out"


def test_another_tokenizer_file_is_found_and_refused(with_tokenizer: Path) -> None:
    path = with_tokenizer / "tokenizer.json"
    assert verify_shards(with_tokenizer) == []
    assert TokenWindows(with_tokenizer).n_tokens
    good = path.read_bytes()
    changed = good.replace(b'"th": 256', b'"he": 256').replace(b'"t h"', b'"h e"')
    for content, message in (
        (changed.replace(b'"th e"', b'"t he"'), "sha256 .*, the manifest says"),
        (good[:-1], "sha256 .*, the manifest says .*: damaged"),
        (None, "missing, though the manifest beside it lists it"),
    ):
        path.unlink() if content is None else path.write_bytes(content)
        [problem] = verify_shards(with_tokenizer)
        assert re.search(f"tokenizer.json: {message}", problem)
        with pytest.raises(DamageError, match=f"{message}.*its tokenizer.json included"):
            TokenWindows(with_tokenizer)


def test_an_older_manifest_finds_another_tokenizer_by_what_it_holds(with_tokenizer: Path) -> None:
    edit_manifest(with_tokenizer, tokenizer__sha256="")
    path = with_tokenizer / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text())))
    assert verify_shards(with_tokenizer) == []
    write_tokenizer_file(path, [("h", "e"), ("t", "he")], "<|endoftext|>")
    assert "is another one than the tokens were made with" in verify_shards(with_tokenizer)[0]
    with pytest.raises(DamageError, match="is another one than the tokens were made with"):
        TokenWindows(with_tokenizer)


def test_a_tokenizer_file_that_changes_meanwhile_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "mine.json"
    write_tokenizer_file(source, [("t", "h"), ("th", "e")], "<|endoftext|>")
    encoding = load_tokenizer(source)
    write_tokenizer_file(source, [("h", "e"), ("t", "he")], "<|endoftext|>")
    with pytest.raises(DamageError, match="is another one than the tokens were made with"):
        new_manifest(tmp_path, str(source), encoding, [])
