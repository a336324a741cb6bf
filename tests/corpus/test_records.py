"""Records and masks: samples of one's own as a corpus, written, read back, verified and refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from megagpt.cli import main
from megagpt.corpus.inspect import describe
from megagpt.corpus.manifest import read_manifest
from megagpt.corpus.records import Masked, prepare
from megagpt.corpus.shards import index_bytes
from megagpt.corpus.verify import verify_files, verify_shards
from megagpt.errors import DamageError, UsageError
from megagpt.files import file_sha256
from megagpt.order.loader import MASKED, TokenLoader
from megagpt.order.trace import trace
from megagpt.order.windows import TokenWindows
from tests.lib.corpus import edit_manifest

R = 7


def random_records(count: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """(ids (count, R) below 10, masks (count, R)); every record scores something."""
    draw = np.random.default_rng(seed)
    ids, scored = draw.integers(0, 10, (count, R)), draw.integers(0, 2, (count, R))
    scored[:, 0], scored[:, 3] = 0, 1
    return ids, scored


@pytest.fixture
def masked(tmp_path: Path) -> Path:
    """Ten masked records in shards of three."""
    ids, scored = random_records(10)
    samples = [Masked(i, s) for i, s in zip(ids, scored, strict=True)]
    prepare(tmp_path / "c", records=samples, vocabulary=10, shard_tokens=3 * R)
    return tmp_path / "c"


def test_window_i_is_record_i_with_its_mask(masked: Path) -> None:
    ids, scored = random_records(10)
    store = TokenWindows(masked)
    assert len(store.manifest.shards) == 4 and store.n_windows(R - 1) == 10
    order = np.array([9, 0, 3, 3])
    assert np.array_equal(store.windows(order, R - 1), ids[order])
    assert np.array_equal(store.scored(order, R - 1), scored[order, 1:].astype(bool))
    loader = TokenLoader([(masked, 1.0)], R - 1, seed=5)
    numbers = loader.places(0, 10).window
    assert sorted(numbers.tolist()) == list(range(10)), "an epoch reads every record once"
    [(x, y)] = loader.micro_batches(0, 10, 0, 1, 10)
    assert np.array_equal(x.numpy(), ids[numbers, :-1])
    kept = scored[numbers, 1:] == 1
    assert np.array_equal(y.numpy()[kept], ids[numbers, 1:][kept])
    assert (y.numpy()[~kept] == MASKED).all() and loader.masked


def test_records_without_a_mask_score_every_target(tmp_path: Path) -> None:
    ids, _ = random_records(5)
    manifest = prepare(tmp_path / "c", records=ids, vocabulary=10)
    assert not manifest.masked and manifest.documents == 5 and manifest.record_length == R
    loader = TokenLoader([(tmp_path / "c", 1.0)], R - 1, seed=5, shuffle=False)
    [(x, y)] = loader.micro_batches(0, 5, 0, 1, 5)
    assert np.array_equal(np.c_[x.numpy(), y.numpy()[:, -1]], ids)
    assert np.array_equal(y.numpy(), ids[:, 1:]) and not loader.masked
    assert verify_shards(tmp_path / "c") == []


def test_masked_documents_are_packed_with_their_ends(tmp_path: Path) -> None:
    documents = [
        Masked([1, 2, 3], [0, 1, 1]),
        Masked([4, 5], [0, 0]),  # nothing of it counts
        Masked([6, 7, 8, 9], [0, 1, 1, 0]),
    ]
    manifest = prepare(tmp_path / "c", documents=documents, vocabulary="bytes", split="test")
    assert manifest.totals["left_out"] == {"no token of it is scored": 1}
    assert manifest.split.name == "test" and manifest.documents == 2
    # 1 2 3 E | 6 7 8 9 E; an end is scored where the token before it is.
    store = TokenWindows(tmp_path / "c")
    assert store.windows(np.array([0, 1]), 4).tolist() == [[1, 2, 3, 256, 6], [6, 7, 8, 9, 256]]
    wanted = [[True, True, True, False], [True, True, False, False]]
    assert store.scored(np.array([0, 1]), 4).tolist() == wanted
    assert verify_shards(tmp_path / "c") == []


def test_a_mixture_of_kinds_is_one_order(tmp_path: Path) -> None:
    draw = np.random.default_rng(3)
    for name in ("talks", "plain"):
        rows = draw.integers(0, 256, (30, 9))
        if name == "talks":
            talks = [Masked(row, [0, 0, 0, 0, 1, 1, 1, 1, 1]) for row in rows]
            prepare(tmp_path / name, records=talks, vocabulary="bytes")
        else:
            prepare(tmp_path / name, documents=rows, vocabulary="bytes")
    sources = [(tmp_path / "talks", 1.0), (tmp_path / "plain", 1.0)]
    loader = TokenLoader(sources, 8, seed=1)
    places = loader.places(0, 40)
    [(_, y)] = loader.micro_batches(0, 40, 0, 1, 40)
    masked = (y.numpy() == MASKED).sum(1)
    assert (masked[places.source == 0] == 3).all() and (masked[places.source == 1] == 0).all()
    # Half of it is not the whole: the rest of the state is one integer, for any layout.
    again = TokenLoader(sources, 8, seed=1)
    for rank in (0, 1):
        for i, (_, part) in enumerate(again.micro_batches(10, 12, rank, 2, 3)):
            first = 10 + (2 * i + rank) * 3
            assert np.array_equal(part.numpy(), y.numpy()[first : first + 3])


def test_the_name_of_a_corpus_covers_its_kind_and_mask(tmp_path: Path) -> None:
    ids, scored = random_records(4)
    other = 1 - scored
    other[:, 0] = 0
    names = set()
    for number, samples in enumerate(
        (
            ids,
            [Masked(i, s) for i, s in zip(ids, scored, strict=True)],
            [Masked(i, s) for i, s in zip(ids, np.c_[other[:, :-1], [1] * 4], strict=True)],
        )
    ):
        prepare(tmp_path / f"{number}", records=samples, vocabulary="bytes")
        names.add(TokenWindows(tmp_path / f"{number}").fingerprint)
    assert len(names) == 3


def test_the_trace_and_the_description_tell_of_masks(masked: Path) -> None:
    ids, scored = random_records(10)
    loader = TokenLoader([(masked, 1.0)], R - 1, seed=5)
    for sample in trace(loader, 0, 10):
        assert np.array_equal(sample.tokens, ids[sample.window])
        assert np.array_equal(sample.scored, scored[sample.window].astype(bool))
        assert [(s.document, s.offset, s.tokens) for s in sample.spans] == [(sample.window, 0, R)]
    text = describe(masked, documents=1)
    assert "10 records of 7 tokens, for n_ctx 6" in text and "tokenizer none: 10 tokens\n" in text
    assert f"{scored.sum()} tokens ({scored.mean():.1%}) are scored as targets" in text
    assert f"record 0 (7 tokens):\n{' '.join(map(str, ids[0]))}" in text


def test_the_longest_stretch_without_a_target_is_told(tmp_path: Path) -> None:
    masks = [[1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    documents = [Masked([1, 2, 3, 4], mask) for mask in masks]
    prepare(tmp_path / "c", documents=documents, vocabulary="bytes", shard_tokens=5)
    # 1 0 0 0 0 | 0 0 1 0 0 | 0 0 0 1 1: six from the first shard into the second.
    assert "the longest stretch without one has 6 tokens" in describe(tmp_path / "c", 0)


# --- damage -------------------------------------------------------------------------------------


def test_every_damage_of_a_mask_is_named(masked: Path, capsys) -> None:
    assert main(["data", "verify", str(masked)]) == 0
    assert "whole, 4 shards, 10 records, 70 tokens" in capsys.readouterr().out
    assert verify_shards(masked) == [] == verify_files(read_manifest(masked))
    path = masked / "c_00001.mask"
    whole = path.read_bytes()
    path.write_bytes(whole[:5] + b"\2" + whole[6:])
    problems = verify_shards(masked)
    assert len(problems) == 2 and all(str(path) in problem for problem in problems)
    assert "1 bytes are neither 0 nor 1, first at 5" in problems[1]
    assert any("sha256" in problem for problem in verify_files(read_manifest(masked)))
    with pytest.raises(DamageError, match="a mask holds the byte 2, which is neither 0 nor 1"):
        TokenWindows(masked).scored(np.arange(10), R - 1)
    path.write_bytes(whole[:-1])
    with pytest.raises(DamageError, match=r"c_00001.mask: has 20 bytes, the manifest .* says 21"):
        TokenWindows(masked)
    path.unlink()
    assert main(["data", "verify", str(masked)]) == 3
    assert main(["data", "inspect", str(masked)]) == 3


def test_a_record_of_another_length_is_named(masked: Path) -> None:
    index = masked / "c_00000.idx"
    index.write_bytes(index_bytes(np.array([R + 1, R - 1, R]), np.dtype("<u2")))
    edit_manifest(masked, shards__0__index_sha256=file_sha256(index))
    assert verify_shards(masked) == [
        f"{index}: record 0 has not the 7 tokens that the manifest tells"
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"records__length": 5}, "21 tokens are no records of 5"),
        ({"records__length": 1}, "records of 1 tokens have no target"),
        ({"shards__0__mask_sha256": ""}, "c_00000 has no mask, though others have one"),
        ({"format": 3}, "format 3, this megagpt reads formats 1 and 2"),
    ],
)
def test_a_manifest_that_contradicts_itself(masked: Path, changes: dict, message: str) -> None:
    edit_manifest(masked, **changes)
    with pytest.raises((DamageError, UsageError), match=message):
        read_manifest(masked)


# --- what makes no corpus -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"records": [[1, 2], [1, 2, 3]]}, "sample 1 has 3 tokens; all records have one length"),
        ({"records": [[1]]}, "sample 0 has 1 tokens; .* of at least 2 tokens"),
        ({"records": [[1, 10]]}, "sample 0 holds the id 10; ids are 0 to 9"),
        ({"records": [[0.5, 1.0]]}, r"sample 0 is float64 \(2,\); give integers"),
        ({"records": [[]]}, "sample 0 is"),
        ({"records": [[1, 2], Masked([1, 2], [0, 1])]}, "sample 1 has a mask and others have none"),
        ({"records": [Masked([1, 2], [0, 1]), [1, 2]]}, "sample 1 has no mask and others have one"),
        ({"records": [[1, [2]]]}, r"sample 0 is object \(\); give integers, one row each"),
        ({"records": [Masked([1, 2], [0, [1]])]}, "its mask must be 2 of 0 and 1"),
        ({"records": [Masked([1, 2], [0, 2])]}, "its mask must be 2 of 0 and 1, one for each id"),
        ({"records": [Masked([1, 2], [1, 0])]}, r"write \(1 left out: no token of it"),
        ({"records": []}, r"no sample is left to write \(none was given\); give one"),
        ({"records": [[1, 2]], "documents": [[1]]}, "give either records or documents"),
        ({}, "give either records or documents"),
        ({"documents": [[1, 2]]}, "documents end with END-OF-DOCUMENT, which a tokenizer names"),
        ({"records": [[1, 2]], "split": "dev"}, "split 'dev': must be train, validation or test"),
        ({"records": [[1, 2]], "vocabulary": Path("absent.json")}, "absent.json"),
        ({"records": [[1, 2]], "vocabulary": np.int64(2)}, "sample 0 holds the id 2"),
        ({"records": [[1, 2]], "vocabulary": 0}, "vocabulary 0: must have 1 to 2147483647 ids"),
        ({"records": [[1, 2]], "vocabulary": 2**31}, "vocabulary 2147483648: must have 1 to"),
        ({"records": [[1, 2]], "vocabulary": 5.5}, "vocabulary 5.5: must be a tokenizer's name or"),
        ({"documents": [[1, 256]], "vocabulary": "bytes"}, r"sample 0 holds END-OF-DOCUMENT \(256"),
    ],
)
def test_what_is_no_corpus_is_refused(tmp_path: Path, given: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        prepare(tmp_path / "c", **{"vocabulary": 10} | given)
    if (tmp_path / "c").exists():
        assert not any((tmp_path / "c").iterdir()), "the next call may be of anything"


def test_the_same_samples_again_do_nothing_and_others_are_refused(masked: Path) -> None:
    ids, scored = random_records(10)
    samples = [Masked(i, s) for i, s in zip(ids, scored, strict=True)]
    before = {path.name: path.stat().st_mtime_ns for path in masked.iterdir()}
    prepare(masked, records=samples, vocabulary=10, shard_tokens=3 * R)
    assert {path.name: path.stat().st_mtime_ns for path in masked.iterdir()} == before
    with pytest.raises(UsageError, match="already holds another corpus"):
        prepare(masked, records=samples[:-1], vocabulary=10, shard_tokens=3 * R)
    with pytest.raises(
        UsageError, match="a corpus of the train split in the vocabulary 10; choose"
    ):
        prepare(masked, records=samples, vocabulary=10, split="validation")


def test_ids_of_no_text_are_not_those_of_a_tokenizer_as_large(tmp_path: Path) -> None:
    ids, _ = random_records(3)
    prepare(tmp_path / "c", records=ids, vocabulary=257)
    with pytest.raises(UsageError, match="already holds .* in the vocabulary 257; choose another"):
        prepare(tmp_path / "c", records=ids, vocabulary="bytes")


def test_a_preparation_that_was_killed_starts_over(tmp_path: Path) -> None:
    ids, _ = random_records(12)

    def dies():
        yield from ids[:9]
        raise KeyboardInterrupt

    import megagpt.corpus.records as module

    whole, module.BATCH = module.BATCH, 2 * R
    try:
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path / "c", records=dies(), vocabulary=10, shard_tokens=2 * R)
        with pytest.raises(UsageError, match="its preparation did not finish"):
            read_manifest(tmp_path / "c")
        manifest = prepare(tmp_path / "c", records=ids[:2], vocabulary=10, shard_tokens=2 * R)
    finally:
        module.BATCH = whole
    assert manifest.documents == 2 and verify_shards(tmp_path / "c") == []


def test_files_of_others_stay(tmp_path: Path) -> None:
    names = {"train-images.idx3-ubyte", "all.bin.gz", "notes.mask", "other_00000.mask"}
    for name in names:
        (tmp_path / name).write_text(name)
    (tmp_path / f"{tmp_path.name}_00000.mask").write_text("of a preparation that was killed")
    prepare(tmp_path, records=[[1, 2, 3]], vocabulary=10)
    assert {name for name in names if (tmp_path / name).read_text() == name} == names
    assert not (tmp_path / f"{tmp_path.name}_00000.mask").exists()
    strange = [tmp_path / "notes.mask", tmp_path / "other_00000.mask"]
    assert verify_shards(tmp_path) == [f"{path}: not in the manifest" for path in strange]


def test_another_context_is_refused(masked: Path) -> None:
    with pytest.raises(UsageError, match=r"records have 7 tokens, which need model.n_ctx = 6, not"):
        TokenLoader([(masked, 1.0)], 8, seed=1)


def test_what_format_1_can_say_is_of_format_1(tmp_path: Path) -> None:
    prepare(tmp_path / "c", documents=[[1, 2, 3]], vocabulary="bytes")
    told = json.loads((tmp_path / "c/manifest.json").read_text())
    assert told["format"] == 1 and "records" not in told and "mask_sha256" not in told["shards"][0]
