"""Documents that are there twice, or nearly so, go once, as often as is said."""

import random
from pathlib import Path

import numpy as np
import pytest
from datasketch import MinHash, MinHashLSH
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.corpus.duplicates import Seen, Similar, bands_for, signature
from megagpt.corpus.pipe import prepare
from megagpt.corpus.recipe import PrepareOptions
from tests.corpus.test_prepare import content, decoded, jsonl, sample_texts


def test_exact_duplicates_go_and_the_first_stays(tmp_path: Path) -> None:
    texts = sample_texts(50)
    path = jsonl(tmp_path / "in.jsonl", [*texts, *texts[:20], "new", *texts[40:]])
    summary = prepare(
        [path], PrepareOptions(output=tmp_path / "out", deduplicate=True, unit_bytes=300)
    )
    assert decoded(tmp_path / "out") == [*texts, "new"]
    assert summary.left_out["duplicate"] == 30


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 40), max_size=20), max_size=20))
def test_seen_is_a_set(batches: list[list[int]]) -> None:
    seen, known = Seen(), set()
    for batch in batches:
        expected = []
        for number in batch:
            expected.append(number not in known)
            known.add(number)
        assert seen.first(np.array(batch, np.uint64)).tolist() == expected


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), threshold=st.sampled_from([0.5, 0.8, 0.9]))
def test_similar_is_datasketchs_index(seed: int, threshold: float) -> None:
    """The same candidates as its MinHashLSH has with these bands, whatever the batches."""
    draw = np.random.default_rng(seed)
    rows = draw.integers(0, 2**32, (6, 32), np.uint32)[draw.integers(0, 6, 60)]
    changed = draw.random(rows.shape) < draw.choice([0, 0.1, 0.3], (60, 1))
    rows = np.where(changed, draw.integers(0, 2**32, rows.shape, np.uint32), rows)
    bands = bands_for(threshold, 32)
    index, kept, expected = MinHashLSH(num_perm=32, params=bands[:2]), [], []
    for row in rows:
        sketch = MinHash(num_perm=32, scheme="affine32", hashvalues=row)
        near = [n for n in index.query(sketch) if np.sum(kept[n] == row) >= bands.matches]
        expected.append(not near)
        if not near:
            index.insert(len(kept), sketch)
            kept.append(row)
    similar = Similar(bands)
    parts = np.split(rows, sorted(draw.integers(0, 60, 3)))
    assert [stays for part in parts for stays in similar.first(part)] == expected


def share_that_goes(jaccard: float, similarity: float, pairs: int = 300) -> float:
    """Of pairs of documents with exactly this similarity of their 5-word shingles."""
    texts = []
    for pair in range(pairs):
        words = [f"w{pair}-{number}" for number in range(2000)]
        shared = round(2 * 500 * jaccard / (1 + jaccard))
        # The second begins with the end of the first.
        texts.append(" ".join(words[:504]))
        texts.append(" ".join(words[500 - shared : 1004 - shared]))
    signatures = np.stack([signature(text, 128) for text in texts])
    stays = Similar(bands_for(similarity, 128)).first(signatures)
    assert stays[::2].all()
    return 1 - stays[1::2].mean()


@pytest.mark.parametrize(
    ("jaccard", "least", "most"),
    # At 0.8 at least 95% are promised: 92% is 2.4 standard deviations of 300 pairs below that.
    [(0.8, 0.92, 1), (0.85, 0.99, 1), (0.9, 1, 1), (0.7, 0.1, 0.35), (0.6, 0, 0.02), (0.3, 0, 0)],
)
def test_near_duplicates_are_found_as_often_as_is_said(
    jaccard: float, least: float, most: float
) -> None:
    assert least <= share_that_goes(jaccard, 0.8) <= most


@pytest.mark.parametrize("similarity", [0.5, 0.9, 0.95])
def test_other_similarities_are_found_as_often(similarity: float) -> None:
    assert share_that_goes(similarity, similarity) >= 0.92


@pytest.mark.parametrize("hashes", [2, 10, 128, 1000, 4096])
@pytest.mark.parametrize("similarity", [0.01, 0.5, 0.8, 1.0])
def test_bands_fit_the_hashes(similarity: float, hashes: int) -> None:
    bands = bands_for(similarity, hashes)
    assert bands.rows >= 1 and 1 <= bands.bands * bands.rows <= hashes
    assert 0 <= bands.matches <= hashes


def test_near_duplicates_go(tmp_path: Path) -> None:
    draw = random.Random(3)
    words = [f"w{n}" for n in range(5000)]
    texts = [" ".join(draw.choices(words, k=300)) for _ in range(20)]
    copies = [text + " one more ending" for text in texts[:5]]
    half = " ".join(texts[0].split()[:150] + draw.choices(words, k=150))
    path = jsonl(tmp_path / "in.jsonl", [*texts, *copies, half])
    outputs = []
    for workers in (1, 3):
        folder = tmp_path / str(workers) / "out"
        options = PrepareOptions(
            output=folder, near_duplicates=0.8, workers=workers, unit_bytes=3000
        )
        summary = prepare([path], options)
        assert summary.left_out == {"near-duplicate": 5}
        outputs.append(content(folder))
    assert decoded(tmp_path / "1/out") == [*texts, half]
    assert outputs[0] == outputs[1]
