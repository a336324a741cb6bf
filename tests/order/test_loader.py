"""Samples and micro-batches: the same for every layout, resume point and thread."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.errors import DamageError, UsageError
from megagpt.order.loader import TokenLoader, unique_names
from tests.order.test_windows import random_documents, write_corpus

N_CTX = 8


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three corpora of different sizes."""
    root = tmp_path_factory.mktemp("corpora")
    for i, n_tokens in enumerate((801, 300, 90)):
        write_corpus(root / f"c{i}", random_documents(i, n_tokens))
    return [root / f"c{i}" for i in range(3)]


@pytest.fixture(scope="module")
def loader(folders: list[Path]) -> TokenLoader:
    """60%, 30% and 10%."""
    return TokenLoader(list(zip(folders, (6, 3, 1), strict=True)), N_CTX, seed=1)


def test_an_epoch_reads_every_window_once(folders: list[Path]) -> None:
    loader = TokenLoader([(folders[0], 1.0)], N_CTX, seed=3)
    n = loader.n_windows
    assert n == 100
    in_order = TokenLoader([(folders[0], 1.0)], N_CTX, seed=3, shuffle=False).samples(0, n)
    epochs = [loader.samples(e * n, n) for e in range(3)]
    for epoch in epochs:
        assert not np.array_equal(epoch, in_order)
        assert sorted(epoch.tolist()) == sorted(in_order.tolist())
    assert not np.array_equal(epochs[0], epochs[1])
    assert loader.consumed(250)[0] == {
        "path": str(folders[0]),
        "name": "c0",
        "samples": 250,
        "tokens": 2000,
        "epochs": 2.5,
    }


def test_every_source_is_read_without_replacement(loader: TokenLoader) -> None:
    places = loader.places(0, 1000)
    for i, (store, took) in enumerate(zip(loader.stores, loader.consumed(1000), strict=True)):
        windows, n = places.window[places.source == i], store.n_windows(N_CTX)
        assert took["samples"] == len(windows) and took["epochs"] == len(windows) / n
        for start in range(0, len(windows), n):
            epoch = windows[start : start + n]
            assert len(set(epoch.tolist())) == len(epoch)
    assert [took["samples"] for took in loader.consumed(1000)] == [600, 300, 100]


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["data/web", "data/books"], ["web", "books"]),
        (["a/web", "b/web", "b/books"], ["a/web", "b/web", "books"]),
        (["x/a/web", "y/a/web", "a/web/"], ["x/a/web", "y/a/web", "{here}/a/web"]),
        (["one/./train", "two/../one/sub/train"], ["one/train", "sub/train"]),
        (["."], ["{here}"]),
        (["/web", "/data/web"], ["//web", "data/web"]),
    ],
)
def test_no_two_sources_have_one_name(folders, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = [name.replace("{here}", tmp_path.name) for name in names]
    assert unique_names([Path(folder) for folder in folders]) == expected


def test_corpora_in_folders_of_one_name_are_counted_apart(tmp_path):
    for i, place in enumerate(("news", "forum", "books")):
        write_corpus(tmp_path / place / "train", random_documents(i, 300))
    folders = [tmp_path / place / "train" for place in ("news", "forum", "books")]
    loader = TokenLoader(list(zip(folders, (5, 3, 2), strict=True)), N_CTX, seed=1)
    taken = {took["name"]: took["tokens"] for took in loader.consumed(100)}
    assert taken == {"news/train": 400, "forum/train": 240, "books/train": 160}


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_layout_and_resume_change_nothing(loader: TokenLoader, data: st.DataObject) -> None:
    """Any ranks, micro-batch and size of each step, any resume point, read ahead or not."""
    first = data.draw(st.integers(0, 3000), "samples consumed before")
    begin, parts = first, []
    for _ in range(data.draw(st.integers(1, 4), "steps")):
        ranks, micro_batch = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
        micros = data.draw(st.integers(1, 3))
        count = ranks * micro_batch * micros
        step = np.full((micros, ranks, micro_batch, N_CTX + 1), -1)
        for rank in range(ranks):
            if data.draw(st.booleans(), "ahead"):
                loader.prefetch(first, count, rank, ranks, micro_batch)
            elif data.draw(st.booleans(), "ahead for nothing"):
                loader.prefetch(first + 1, count, rank, ranks, micro_batch)
            batches = list(loader.micro_batches(first, count, rank, ranks, micro_batch))
            assert len(batches) == micros
            for i, (x, y) in enumerate(batches):
                assert x.shape == y.shape == (micro_batch, N_CTX)
                assert x.dtype == y.dtype == torch.int64
                assert x.is_contiguous() and y.is_contiguous()
                step[i, rank, :, :-1] = x.numpy()
                step[i, rank, :, 1:] = y.numpy()
                assert torch.equal(x[:, 1:], y[:, :-1])
        parts.append(step.reshape(count, N_CTX + 1))
        first += count
    assert np.array_equal(np.concatenate(parts), loader.samples(begin, first - begin))


def test_the_order_is_fixed_for_ever(tmp_path: Path) -> None:
    """A change of these numbers changes the data order of every run that anyone resumes."""
    for name, step in (("a", 7), ("b", 5)):
        write_corpus(tmp_path / name, [[step * i % 256 for i in range(j)] for j in range(40)])
    loader = TokenLoader([(tmp_path / "a", 0.7), (tmp_path / "b", 0.3)], N_CTX, seed=1)
    places = loader.places(1000, 12)
    assert places.source.tolist() == [0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 1]
    assert places.draw.tolist() == [700, 300, 701, 702, 301, 703, 704, 705, 302, 706, 707, 303]
    assert places.window.tolist() == [67, 24, 0, 72, 100, 37, 8, 78, 43, 74, 95, 31]
    assert loader.digest(1000, 12) == "264d8595fa9b7e3e"


def test_places_and_list_order_do_not_matter(
    loader: TokenLoader, folders: list[Path], tmp_path: Path
) -> None:
    """The same corpora moved elsewhere and listed the other way round."""
    for i, folder in enumerate(folders):
        (tmp_path / str(i)).symlink_to(folder)
    sources = [(tmp_path / "2", 0.1), (tmp_path / "1", 0.3), (tmp_path / "0", 0.6)]
    moved = TokenLoader(sources, N_CTX, seed=1)
    assert np.array_equal(moved.samples(700, 50), loader.samples(700, 50))
    assert moved.digest(700, 50) == loader.digest(700, 50)
    assert moved.fingerprint(700) == loader.fingerprint(700)


def test_the_digest_names_samples_and_their_order(loader: TokenLoader, folders: list[Path]) -> None:
    digest = loader.digest(64, 32)
    assert len(digest) == 16 and int(digest, 16) >= 0
    assert digest == loader.digest(64, 32)
    sources = list(zip(folders, (6, 3, 1), strict=True))
    others = [
        loader.digest(64, 31),
        loader.digest(65, 32),
        TokenLoader(sources, N_CTX, seed=2).digest(64, 32),
        TokenLoader(sources, N_CTX, seed=1, shuffle=False).digest(64, 32),
        TokenLoader(sources, N_CTX + 1, seed=1).digest(64, 32),
        TokenLoader([*sources[:2], (folders[2], 2)], N_CTX, seed=1).digest(64, 32),
    ]
    assert len({digest, *others}) == 7


def test_the_fingerprint_is_of_all_that_decides_the_order(
    loader: TokenLoader, folders: list[Path]
) -> None:
    sources = list(zip(folders, (6, 3, 1), strict=True))
    prints = [
        loader.fingerprint(10),
        TokenLoader(sources, N_CTX, seed=2).fingerprint(10),
        TokenLoader(sources, N_CTX, seed=1, shuffle=False).fingerprint(10),
        TokenLoader(sources, N_CTX + 1, seed=1).fingerprint(10),
        TokenLoader([*sources[:2], (folders[2], 2)], N_CTX, seed=1).fingerprint(10),
        TokenLoader(sources, N_CTX, seed=1, changes=[(9, [1, 1, 1])]).fingerprint(10),
    ]
    assert len(set(prints)) == len(prints)


def test_a_change_of_weights_keeps_the_past(loader: TokenLoader, folders: list[Path]) -> None:
    sources = list(zip(folders, (6, 3, 1), strict=True))
    changed = TokenLoader(sources, N_CTX, seed=1, changes=[(500, [1, 1, 8])])
    assert changed.digest(0, 500) == loader.digest(0, 500)
    assert changed.digest(480, 40) != loader.digest(480, 40)
    assert [took["samples"] for took in changed.consumed(600)] == [310, 160, 130]


def test_what_the_sources_share(loader: TokenLoader) -> None:
    assert (loader.tokenizer_name, loader.vocab_size, loader.end_of_document) == ("bytes", 257, 256)
    assert loader.n_windows == 100 + 37 + 11


def test_sources_that_do_not_go_together(folders: list[Path], tmp_path: Path) -> None:
    write_corpus(tmp_path / "other", [[1] * 20], fingerprint="e" * 64)
    write_corpus(tmp_path / "larger", [[1] * 20], fingerprint="", vocab_size=300)
    write_corpus(tmp_path / "unknown", [[1] * 20], fingerprint="")
    for name, what in (("other", "eeeeeeeeeeee"), ("larger", "unknown")):
        with pytest.raises(
            UsageError, match=rf"{name} is tokenized with bytes .*fingerprint {what}"
        ):
            TokenLoader([(folders[0], 1), (tmp_path / name, 1)], N_CTX, seed=1)
    TokenLoader([(folders[0], 1), (tmp_path / "unknown", 1)], N_CTX, seed=1)
    (tmp_path / "copy").symlink_to(folders[0])
    with pytest.raises(
        UsageError, match=r"copy: holds the same tokens as .*c0; list a corpus once"
    ):
        TokenLoader([(folders[0], 1), (tmp_path / "copy", 1)], N_CTX, seed=1)
    with pytest.raises(
        UsageError, match=r"c2: 90 tokens do not fill one window of n_ctx \+ 1 = 91"
    ):
        TokenLoader([(folders[0], 1), (folders[2], 1)], 90, seed=1)


def test_reading_ahead_happens_in_a_thread_and_is_taken_once(
    folders: list[Path], tmp_path: Path
) -> None:
    tokens = write_corpus(tmp_path / "c", random_documents(5, 300), shard_tokens=1000)
    loader = TokenLoader([(tmp_path / "c", 1)], N_CTX, seed=1)
    expected = loader.samples(0, 4)
    loader.prefetch(0, 4, 0, 1, 2)
    assert loader._thread is not None
    loader._thread.submit(lambda: None).result()
    # What was read ahead is not read again: the file changes, the samples do not.
    changed = np.where(tokens == 256, 256, 0).astype("<u2").tobytes()
    (tmp_path / "c" / "c_00000.bin").write_bytes(changed)
    ahead = torch.cat([x for x, _ in loader.micro_batches(0, 4, 0, 1, 2)])
    again = torch.cat([x for x, _ in loader.micro_batches(0, 4, 0, 1, 2)])
    assert np.array_equal(ahead.numpy(), expected[:, :-1])
    assert set(again.unique().tolist()) <= {0, 256}
    loader.close()
    assert np.array_equal(loader.samples(0, 4)[:, :-1], again.numpy())


def test_an_error_of_reading_ahead_arrives(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", random_documents(5, 300), shard_tokens=1000)
    loader = TokenLoader([(tmp_path / "c", 1)], N_CTX, seed=1)
    (tmp_path / "c" / "c_00000.bin").write_bytes(b"")
    loader.prefetch(0, 4, 0, 1, 2)
    with pytest.raises(DamageError, match=r"c_00000.bin: ends at byte"):
        list(loader.micro_batches(0, 4, 0, 1, 2))
    loader.close()


def test_the_order_needs_no_torch(folders: list[Path]) -> None:
    """What a light command imports; a fresh process shows it."""
    code = (
        "import sys\n"
        "from megagpt.order.loader import TokenLoader\n"
        f"TokenLoader([({str(folders[0])!r}, 1.0)], 8, seed=1).samples(0, 10)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
