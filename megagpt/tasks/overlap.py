"""Prepared corpora as text: the words in them, and what questions share with them."""

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
from megagpt.errors import UsageError
from megagpt.tasks.examples import Example
from megagpt.tokenizer import load_tokenizer

CLEAN, DIRTY, SHORT = "clean", "dirty", "short"
"""No 13-gram of the question is in the training data; one is; it has no 13 words."""
_WORD = re.compile(r"[a-z]+")
_QUESTION = re.compile(r"What is (\d+) (plus|minus) (\d+)\?")
_SUM = re.compile(r"(?<!\d)(\d+) (?:([+-]) (\d+) =|(plus|minus) (\d+)(?!\d))")
"""What the paper looks for in place of 13-grams: "<a> + <b> =" and "<a> plus <b>" (its 3.9.1)."""


def documents_of(folder: Path, label: str) -> Iterator[str]:
    """The text of every document or record of a prepared corpus. Raises UsageError for ids that
    stand for no text, and what reading it raises."""
    manifest = read_manifest(folder)
    if not manifest.tokenizer_name:
        raise UsageError(
            f"{folder}: its ids stand for no text; give a corpus that was made of text"
        )
    encoding = load_tokenizer(manifest.tokenizer, manifest.fingerprint)
    total = sum(shard.bytes for shard in manifest.shards)
    with Progress(f"{label} {folder}", total) as progress:
        for tokens in first_documents(manifest, manifest.documents):
            kept = tokens[tokens != manifest.end_of_document]
            yield encoding.decode(kept.tolist(), errors="replace")
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
    without punctuation, stand in the training data. Unlike there, no shorter overlap counts, but
    for sums and differences, which are dirty when the data hold them in one of two forms.
    """
    of_each = [[_grams(example) for example in examples] for examples in questions]
    every = [grams for task in of_each for grams in task]
    known = np.unique(np.concatenate([np.zeros(0, np.uint64), *every]))
    seen, sums = np.zeros(len(known), np.bool_), set[tuple[str, ...]]()
    for folder in folders:
        for text in documents_of(folder, "looking for questions in"):
            if len(known):
                seen[shared_grams(text, known)] = True
            sums.update(_sums(text))

    def judged(example: Example, grams: NDArray[np.uint64]) -> str:
        if found := _QUESTION.search(example.contexts[0]):
            return DIRTY if found.groups() in sums else CLEAN
        if not len(grams):
            return SHORT
        return DIRTY if seen[np.searchsorted(known, grams)].any() else CLEAN

    return [
        [judged(*pair) for pair in zip(examples, task, strict=True)]
        for examples, task in zip(questions, of_each, strict=True)
    ]


def _sums(text: str) -> Iterator[tuple[str, ...]]:
    """(a, plus or minus, b) of every sum or difference in a text."""
    for a, sign, b, word, other in _SUM.findall(text):
        yield a, word or {"+": "plus", "-": "minus"}[sign], b or other


def _grams(example: Example) -> NDArray[np.uint64]:
    """All 13-grams of a question with any of its answers."""
    parts = [grams for option in example.options for grams in text_grams("".join(option))]
    return np.unique(np.concatenate([np.zeros(0, np.uint64), *parts]))
