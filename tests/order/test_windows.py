"""Windows over the shards of one corpus; `write_corpus` serves the other tests as well."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import megagpt.order.windows as store_module
from megagpt.corpus.manifest import CorpusManifest, read_manifest, write_manifest
from megagpt.corpus.shards import ShardWriter
from megagpt.errors import DamageError, UsageError
from megagpt.order.windows import TokenWindows

END = 256


def write_corpus(
    folder: Path,
    documents: Sequence[Sequence[int]],
    shard_tokens: int = 50,
    vocab_size: int = 257,
    fingerprint: str = "f" * 64,
) -> np.ndarray:
    """A corpus of documents (tokens without END-OF-DOCUMENT, 256); returns all its tokens."""
    folder.mkdir(parents=True)
    writer = ShardWriter(folder, vocab_size, shard_tokens=shard_tokens)
    for document in documents:
        writer.add(np.array([*document, END]), np.array([len(document) + 1]))
    write_manifest(
        CorpusManifest(
            folder=folder,
            tokenizer_name="bytes",
            vocab_size=vocab_size,
            end_of_document=END,
            fingerprint=fingerprint,
            dtype=writer.dtype,
            shards=tuple(writer.close()),
        )
    )
    return np.array([t for document in documents for t in [*document, END]], np.int64)


def random_documents(seed: int, n_tokens: int, longest: int = 30) -> list[list[int]]:
    """Documents of 0 to `longest` random tokens, n_tokens in all with each END-OF-DOCUMENT."""
    rng, documents = np.random.default_rng(seed), []
    while n_tokens:
        size = min(int(rng.integers(0, longest + 1)), n_tokens - 1)
        documents.append(rng.integers(0, END, size).tolist())
        n_tokens -= size + 1
    return documents


def test_sixteen_tokens_by_hand(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", [[1, 2, 3], [], [5, 6, 7, 8, 9], [10, 11, 12, 13]], shard_tokens=6)
    store = TokenWindows(tmp_path / "c")
    # 1 2 3 E E | 5 6 7 8 9 E | 10 11 12 13 E: three shards, 16 tokens
    assert store.ends.tolist() == [5, 11, 16]
    assert store.n_windows(4) == 3
    assert store.windows(np.array([2, 0, 1]), 4).tolist() == [
        [8, 9, END, 10, 11],
        [1, 2, 3, END, END],
        [END, 5, 6, 7, 8],
    ]
    assert store.window(0, 15).tolist() == [
        1,
        2,
        3,
        256,
        256,
        5,
        6,
        7,
        8,
        9,
        256,
        *range(10, 14),
        256,
    ]


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    n_tokens=st.integers(2, 400),
    shard_tokens=st.integers(1, 200),
    n_ctx=st.integers(1, 60),
    wide=st.booleans(),
)
def test_each_token_is_a_target_once(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    n_tokens: int,
    shard_tokens: int,
    n_ctx: int,
    wide: bool,
) -> None:
    folder = tmp_path_factory.mktemp("c") / "corpus"
    size = 70_000 if wide else 257
    tokens = write_corpus(folder, random_documents(seed, n_tokens), shard_tokens, size)
    store = TokenWindows(folder)
    assert store.dtype == (np.int32 if wide else np.uint16)
    if n_tokens <= n_ctx:
        with pytest.raises(UsageError, match="do not fill one window"):
            store.n_windows(n_ctx)
        return
    n = store.n_windows(n_ctx)
    windows = store.windows(np.arange(n), n_ctx)
    assert windows.dtype == store.dtype and windows.shape == (n, n_ctx + 1)
    assert np.array_equal(windows[:, 1:].reshape(-1), tokens[1 : n * n_ctx + 1])
    assert np.array_equal(windows[:, :-1].reshape(-1), tokens[: n * n_ctx])
    assert len(tokens) - 1 - n * n_ctx < n_ctx


def test_many_shards_need_few_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "MAX_OPEN", 3)
    tokens = write_corpus(tmp_path / "c", random_documents(1, 500), shard_tokens=20)
    store = TokenWindows(tmp_path / "c")
    order = np.random.default_rng(0).permutation(store.n_windows(7))
    for _ in range(2):
        windows = store.windows(order, 7)
        assert np.array_equal(windows, np.stack([tokens[i * 7 : i * 7 + 8] for i in order]))
        assert len(store._files) == 3
    store.close()
    assert store.window(0, 7).tolist() == tokens[:8].tolist()


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    documents = random_documents(1, 100)
    write_corpus(tmp_path / "a", documents)
    write_corpus(tmp_path / "elsewhere" / "b", documents)
    write_corpus(tmp_path / "c", [*documents[:-1], [*documents[-1], 7]])
    a, b, c = (TokenWindows(tmp_path / p).fingerprint for p in ("a", "elsewhere/b", "c"))
    # The shards of a and b have different names and the same bytes.
    assert a == b != c


def test_a_shard_of_the_wrong_size_is_named(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", random_documents(1, 200))
    path = tmp_path / "c" / "c_00001.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-2])
    message = rf"c_00001.bin: has {len(content) - 2} bytes, the manifest beside it says"
    with pytest.raises(DamageError, match=message):
        TokenWindows(tmp_path / "c")
    path.unlink()
    with pytest.raises(DamageError, match=r"c_00001.bin: missing, though the manifest"):
        TokenWindows(tmp_path / "c")


def test_a_shard_cut_short_while_open_is_named(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", random_documents(1, 200), shard_tokens=100)
    store = TokenWindows(tmp_path / "c")
    path = tmp_path / "c" / "c_00000.bin"
    path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(DamageError, match=r"c_00000.bin: ends at byte 10, before its .* cut short"):
        store.window(0, 16)


@pytest.mark.parametrize(("vocab_size", "token"), [(257, 300), (70_000, -1)])
def test_a_token_outside_the_vocabulary_is_never_given_out(
    tmp_path: Path, vocab_size: int, token: int
) -> None:
    tokens = write_corpus(tmp_path / "c", random_documents(1, 100), 1000, vocab_size)
    dtype = read_manifest(tmp_path / "c").dtype
    tokens[23] = token
    (tmp_path / "c" / "c_00000.bin").write_bytes(tokens.astype(dtype).tobytes())
    store = TokenWindows(tmp_path / "c")
    store.window(0, 10)
    message = rf"token number 23 is {token}, outside the vocabulary of {vocab_size}.*data verify"
    with pytest.raises(DamageError, match=message):
        store.windows(np.arange(4), 10)
