"""A corpus, document by document: each by itself, as EleutherAI's harness scores rolling text (L3).

A document begins with END-OF-DOCUMENT, which is no target, and is cut into windows of n_ctx targets
with one token before them (megagpt.use.likelihood.document_windows). Nothing of another document is
seen, and every token of the text is scored once.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megagpt.corpus.inspect import first_documents
from megagpt.order.windows import TokenWindows
from megagpt.use.evaluate import Result
from megagpt.use.likelihood import Scorer
from megagpt.use.score import bytes_of_tokens, check_corpus, progress_bar, totals

HELD = 1 << 18
"""Tokens of documents that are held at a time."""


def evaluate_apart(scorer: Scorer, folder: Path) -> Result:
    """The model's loss on each document of the corpus in `folder` by itself.

    Raises UsageError for a corpus of another tokenizer, DamageError for a damaged one.
    """
    store = TokenWindows(folder)
    vocab_size = scorer.model.config.vocab_size
    check_corpus(store, scorer.encoding, vocab_size)
    sizes = bytes_of_tokens(scorer.encoding, vocab_size)
    nats: list[float] = []
    counted: list[tuple[int, int]] = []
    documents = store.manifest.documents
    with progress_bar(f"scoring {folder}", documents, "documents") as add:
        for group in _groups(store):
            nats += [-logprob for logprob in scorer.rolling([ids.tolist() for ids in group])]
            counted += [(len(ids), int(sizes[ids].sum())) for ids in group]
            add(len(group))
    tokens, bytes_ = np.array(counted, np.int64).reshape(-1, 2).T
    return totals(folder, np.array(nats), tokens, bytes_, store.n_tokens - int(tokens.sum()))


def _groups(store: TokenWindows) -> Iterator[list[NDArray[np.int64]]]:
    """All documents without END-OF-DOCUMENT, in order, some at a time."""
    group: list[NDArray[np.int64]] = []
    for tokens in first_documents(store.manifest, store.manifest.documents):
        group.append(np.asarray(tokens[:-1], np.int64))
        if sum(map(len, group)) >= HELD:
            yield group
            group = []
    yield group
