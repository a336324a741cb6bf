"""Prepared corpora as text: the words in them, and the 13-grams that questions share with them."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megagpt.corpus.contamination import shared_grams, text_grams
from megagpt.corpus.inspect import first_documents
from megagpt.corpus.manifest import read_manifest
from megagpt.corpus.progress import Progress
from megagpt.tasks.examples import Example
from megagpt.tokenizer import load_tokenizer

CLEAN, DIRTY, SHORT = "clean", "dirty", "short"
"""No 13-gram of the question is in the training data; one is; it has no 13 words."""
_WORD = re.compile(r"[a-z]+")


def documents_of(folder: Path, label: str) -> Iterator[str]:
    """The text of every document of a prepared corpus. Raises what reading it raises."""
    manifest = read_manifest(folder)
    encoding = load_tokenizer(manifest.tokenizer, manifest.fingerprint)
    total = sum(shard.bytes for shard in manifest.shards)
    with Progress(f"{label} {folder}", total) as progress:
        for tokens in first_documents(manifest, manifest.documents):
            # Without END-OF-DOCUMENT.
            yield encoding.decode(tokens[:-1].tolist(), errors="replace")
            progress.add(tokens.nbytes)


def frequent_words(folder: Path) -> list[str]:
    """The words (letters a to z) of a prepared corpus, the most frequent first, then by name."""
    counts: Counter[str] = Counter()
    for text in documents_of(folder, "counting words of"):
        counts.update(_WORD.findall(text.lower()))
    return sorted(counts, key=lambda word: (-counts[word], word))


def cleanness(questions: Sequence[Sequence[Example]], folders: Sequence[Path]) -> list[list[str]]:
    """CLEAN, DIRTY or SHORT for each example of each task, by the corpora in `folders`.

    As the GPT-3 paper's appendix C, a question is dirty when any 13 words of it, in lower case and
    without punctuation, stand in the training data. Unlike there, no shorter overlap counts.
    """
    of_each = [[_grams(example) for example in examples] for examples in questions]
    every = [grams for task in of_each for grams in task]
    known = np.unique(np.concatenate([np.zeros(0, np.uint64), *every]))
    seen = np.zeros(len(known), np.bool_)
    if len(known):
        for folder in folders:
            for text in documents_of(folder, "looking for questions in"):
                seen[shared_grams(text, known)] = True

    def judged(grams: NDArray[np.uint64]) -> str:
        if not len(grams):
            return SHORT
        return DIRTY if seen[np.searchsorted(known, grams)].any() else CLEAN

    return [[judged(grams) for grams in task] for task in of_each]


def _grams(example: Example) -> NDArray[np.uint64]:
    """All 13-grams of a question with any of its answers."""
    parts = [grams for option in example.options for grams in text_grams("".join(option))]
    return np.unique(np.concatenate([np.zeros(0, np.uint64), *parts]))
