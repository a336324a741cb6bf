"""Shards made by others become ours; ours open in Megatron-LM's reader when it is there."""

import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from megagpt.corpus.adopt import import_shards
from megagpt.corpus.manifest import read_manifest
from megagpt.corpus.shards import HEADER, MAGIC, index_bytes
from megagpt.corpus.verify import verify_shards
from megagpt.errors import DamageError, UsageError
from megagpt.tokenizer import load_tokenizer
from tests.corpus.test_prepare import decoded
from tests.corpus.test_shards import write_folder

TEXTS = ["hello world", "a second document", "x"]
END = 50256


def ids(text: str) -> list[int]:
    return load_tokenizer("gpt2").encode_ordinary(text)


def megatron(
    folder: Path, sequences: list[list[int]], bounds: list[int], kind: str = "<u2"
) -> Path:
    """A pair as Megatron's preprocess_data writes it; `bounds` are its document boundaries."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype(kind)
    sizes = np.array([len(sequence) for sequence in sequences], np.int32)
    np.concatenate([np.array(s, dtype) for s in sequences]).tofile(folder / "m.bin")
    codes = {"<u2": 8, "<i4": 4}
    pointers = (np.cumsum(sizes, dtype=np.int64) - sizes) * dtype.itemsize
    head = HEADER.pack(MAGIC, 1, codes[kind], len(sizes), len(bounds))
    raw = [head, sizes.tobytes(), pointers.tobytes(), np.array(bounds, np.int64).tobytes()]
    (folder / "m.idx").write_bytes(b"".join(raw))
    return folder / "m"


def llmc(path: Path, tokens: list[int]) -> Path:
    head = np.zeros(256, "<i4")
    head[:3] = [20240520, 1, len(tokens)]
    path.write_bytes(head.tobytes() + np.array(tokens, "<u2").tobytes())
    return path


def test_megatron_pairs_with_ends_stay_where_they_are(tmp_path: Path) -> None:
    sequences = [[*ids(text), END] for text in TEXTS]
    prefix = megatron(tmp_path, sequences, [0, 1, 2, 3])
    before = (tmp_path / "m.bin").read_bytes()
    [manifest] = import_shards([prefix])
    assert manifest == read_manifest(tmp_path)
    assert decoded(tmp_path) == TEXTS
    assert (tmp_path / "m.bin").read_bytes() == before
    assert manifest.preparation == {"imported": ["megatron"]}
    with pytest.raises(UsageError, match="has a manifest.json already"):
        import_shards([tmp_path])


@pytest.mark.parametrize(
    ("sequences", "bounds", "kind", "message"),
    [
        ([ids(text) for text in TEXTS], [0, 1, 2, 3], "<u2", "not every document ends with"),
        ([[*ids(text), END] for text in TEXTS], [0, 1, 2, 3], "<i4", "are int32, .* needs uint16"),
        ([[*ids(TEXTS[0]), END, *ids(TEXTS[1]), END], [*ids(TEXTS[2]), END]], [0, 1, 2], "<u2",
         "END-OF-DOCUMENT stands inside"),
        ([ids(TEXTS[0])[:1], [*ids(TEXTS[0])[1:], END], ids(TEXTS[1]), ids(TEXTS[2])],
         [0, 2, 3, 4], "<u2", "not every document ends with"),
    ],
)  # fmt: skip
def test_other_megatron_pairs_are_converted(
    tmp_path: Path, sequences: list, bounds: list, kind: str, message: str
) -> None:
    prefix = megatron(tmp_path / "in", sequences, bounds, kind)
    with pytest.raises(UsageError, match=message + ".*convert it with --output"):
        import_shards([prefix])
    import_shards([tmp_path / "in"], tmp_path / "out")
    assert decoded(tmp_path / "out") == TEXTS


def test_nanogpt_and_llmc_files(tmp_path: Path) -> None:
    after = [token for text in TEXTS for token in [*ids(text), END]]
    before = [token for text in TEXTS for token in [END, *ids(text)]]
    np.array(after, np.uint16).tofile(tmp_path / "train.bin")
    llmc(tmp_path / "fineweb_train_000001.bin", before)
    import_shards([tmp_path / "train.bin"], tmp_path / "nano")
    import_shards([tmp_path / "fineweb_train_000001.bin"], tmp_path / "llmc", shard_tokens=5)
    assert decoded(tmp_path / "nano") == decoded(tmp_path / "llmc") == TEXTS
    assert len(read_manifest(tmp_path / "llmc").shards) == 3
    assert read_manifest(tmp_path / "llmc").sources[0]["format"] == "llmc"
    with pytest.raises(UsageError, match="a nanogpt file has no index; convert it"):
        import_shards([tmp_path / "train.bin"])


def test_an_import_into_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = [token for text in TEXTS for token in [*ids(text), END]]
    for name in ("train", "val"):
        np.array(tokens, np.uint16).tofile(tmp_path / f"{name}.bin")
    (tmp_path / "web").mkdir()
    monkeypatch.chdir(tmp_path / "web")
    import_shards([tmp_path / "train.bin", tmp_path / "val.bin"], Path("."))
    assert decoded(tmp_path / "web") == decoded(tmp_path / "web-validation") == TEXTS


@pytest.mark.parametrize("name", ["heldout", "held-out", "holdout_1", "evaluation", "my_valset"])
def test_a_folder_keeps_what_was_held_out_apart(tmp_path: Path, name: str) -> None:
    for text, file in zip(TEXTS, ("train", name), strict=False):
        np.array([*ids(text), END], np.uint16).tofile(tmp_path / f"{file}.bin")
    import_shards([tmp_path], tmp_path / "out")
    assert decoded(tmp_path / "out") == TEXTS[:1]
    assert decoded(tmp_path / "out-validation") == TEXTS[1:2]


def test_what_a_folder_holds_beside_tokens_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = megatron(tmp_path / "in", [[*ids(text), END] for text in TEXTS], [0, 1, 2, 3]).parent
    import_shards([folder], tmp_path / "one")
    assert caplog.text == ""
    (folder / "more").mkdir()
    (folder / "b.txt").touch()
    import_shards([folder], tmp_path / "two")
    said = f"{folder}: only .bin and .npy files are taken, passed over: b.txt, more/"
    assert said in caplog.text
    (folder / "half.idx").touch()
    with pytest.raises(DamageError, match=r"half.idx: its .bin is not beside it; copy the pair"):
        import_shards([folder], tmp_path / "three")


def test_long_documents_cross_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megagpt.corpus import adopt as convert

    monkeypatch.setattr(convert, "BATCH", 4)
    after = [token for text in TEXTS for token in [*ids(text * 5), END, END]]
    np.array(after[:-2], np.uint16).tofile(tmp_path / "train.bin")
    import_shards([tmp_path / "train.bin"], tmp_path / "out")
    assert decoded(tmp_path / "out") == [text * 5 for text in TEXTS]


def test_imports_that_cannot_be_right_are_refused(tmp_path: Path) -> None:
    np.array([1, 60000], np.uint16).tofile(tmp_path / "a.bin")
    with pytest.raises(UsageError, match="holds token 60000, outside the 50257 of gpt2"):
        import_shards([tmp_path / "a.bin"], tmp_path / "x")
    with pytest.raises(UsageError, match="nothing: no .bin file there"):
        import_shards([tmp_path / "nothing"], tmp_path / "y")
    with pytest.raises(UsageError, match="is not empty"):
        import_shards([tmp_path / "a.bin"], tmp_path)
    (tmp_path / "a.bin").write_bytes(b"\1\2\3")
    with pytest.raises(DamageError, match="3 bytes are no uint16 tokens"):
        import_shards([tmp_path / "a.bin"], tmp_path / "z")
    path = llmc(tmp_path / "b.bin", [1, 2])
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DamageError, match="b.bin: not a whole llm.c shard"):
        import_shards([path], tmp_path / "w")
    prefix = megatron(tmp_path / "m", [[1, END]], [0, 1])
    (tmp_path / "m/m.bin").write_bytes(b"ab")
    with pytest.raises(
        DamageError, match="m.idx: its lengths add up to 4 bytes, its .bin has 2; copy"
    ):
        import_shards([prefix])


def test_sequences_that_do_not_cover_the_file(tmp_path: Path) -> None:
    prefix = megatron(tmp_path, [[1, END], [2, END]], [0, 1, 2])
    (tmp_path / "m.bin").write_bytes((tmp_path / "m.bin").read_bytes() + b"\1\0")
    for output in (None, tmp_path / "out"):
        with pytest.raises(DamageError, match="add up to 8 bytes, its .bin has 10"):
            import_shards([prefix], output)


def test_pairs_of_two_folders(tmp_path: Path) -> None:
    one = megatron(tmp_path / "1", [[1, END]], [0, 1])
    two = megatron(tmp_path / "2", [[1, END]], [0, 1])
    with pytest.raises(UsageError, match="the pairs lie in different folders"):
        import_shards([one, two])


def test_our_index_is_what_megatron_writes(tmp_path: Path) -> None:
    """Byte for byte the index that another writer makes of the same documents."""
    documents = [[1, 2, 3], [4]]
    manifest = write_folder(tmp_path / "web", documents)
    sequences = [[*document, 256] for document in documents]
    prefix = megatron(tmp_path / "m", sequences, [0, 1, 2])
    ours = manifest.index_path(manifest.shards[0]).read_bytes()
    assert ours == prefix.with_suffix(".idx").read_bytes()
    assert ours == index_bytes(np.array([4, 2]), np.dtype("<u2"))
    assert verify_shards(tmp_path / "web") == []


def test_shards_open_in_megatron(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Needs Megatron-LM, installed or as a checkout that MEGATRON_LM names."""
    if os.environ.get("MEGATRON_LM"):
        monkeypatch.syspath_prepend(os.environ["MEGATRON_LM"])
    if not importlib.util.find_spec("megatron"):
        pytest.skip("Megatron-LM is not installed and MEGATRON_LM names no checkout")
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    documents = [[1, 2, 3], [], [4] * 50]
    manifest = write_folder(tmp_path / "web", documents)
    dataset = IndexedDataset(str(manifest.bin_path(manifest.shards[0]).with_suffix("")))
    assert len(dataset) == 3 and dataset.document_indices.tolist() == [0, 1, 2, 3]
    assert [dataset[place].tolist() for place in range(3)] == [[*d, 256] for d in documents]
    sys.modules.pop("megatron", None)
