"""Corpora for the items that train: generated sentences, as bytes and in GPT-2's vocabulary.

Speed does not depend on the text, and a machine lent for minutes has no time to tokenize one.
"""

import os
from pathlib import Path

from tests.lib.corpus import sentences, write_corpus

SETS = {"bytes": 4_000, "gpt2": 20_000}
"""Vocabulary -> documents."""


def work() -> Path:
    """Folder of corpora and runs."""
    folder = Path(os.environ["GPU_CHECK_WORK"])
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def corpus(tokenizer: str) -> Path:
    """The prepared corpus of a vocabulary."""
    return work() / f"corpus-{tokenizer}"


def main() -> None:
    """Write what is missing."""
    for tokenizer, documents in SETS.items():
        if not corpus(tokenizer).exists():
            write_corpus(corpus(tokenizer), sentences(documents, seed=1), tokenizer)


if __name__ == "__main__":
    main()
