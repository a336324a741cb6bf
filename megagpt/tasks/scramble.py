"""GPT-3's scrambled words, made by its rules (Brown et al. 2020, section 3.9.2; stdlib).

The forms and the lengths are those of the files that OpenAI published. The paper takes the 10,000
most frequent words of a list; which list is up to the user: a file with a word a line, the most
frequent first, perhaps with a count behind a tab.
"""

import random
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from megagpt.errors import UsageError
from megagpt.tasks.examples import Example, Task

COUNT = 10_000
"""Words of each task, as in the paper, where the list has as many."""
SHOTS = 100
INSTRUCTION = "Please unscramble the letters into a word, and write that word:"
LONGEST = 15
_INSERTED = " ./!"
_WORD = re.compile(r"[a-z]+")
SYSTEM = Path("/usr/share/dict/words")
"""A word list that many systems have; it is in the order of the alphabet."""


def _cycled(word: str, draw: random.Random) -> str:
    """Its letters moved round by some places."""
    places = draw.randrange(1, len(word))
    return word[places:] + word[:places]


def _shuffled(word: str, edge: int, draw: random.Random) -> str:
    """All but the first and last `edge` letters in another order."""
    inner = list(word[edge:-edge])
    draw.shuffle(inner)
    return word[:edge] + "".join(inner) + word[-edge:]


def _inserted(word: str, draw: random.Random) -> str:
    """One of the four characters between any two letters."""
    return "".join(letter + draw.choice(_INSERTED) for letter in word[:-1]) + word[-1]


KINDS: dict[str, tuple[str, int, Callable[[str, random.Random], str]]] = {
    "cycle_letters_in_word": ("CL", 6, _cycled),
    "mid_word_1_anagrams": ("A1", 5, lambda word, draw: _shuffled(word, 1, draw)),
    "mid_word_2_anagrams": ("A2", 6, lambda word, draw: _shuffled(word, 2, draw)),
    "random_insertion_in_word": ("RI", 6, _inserted),
    "reversed_words": ("RW", 6, lambda word, draw: word[::-1]),
}
"""Name -> (the paper's, shortest word, what becomes of it)."""
LABELS = {label: name for name, (label, _, _) in KINDS.items()}


def scramble(
    name: str, words: Iterable[str], source: str, seed: int = 0, count: int = COUNT
) -> Task:
    """A task of KINDS on the first `count` words that fit; the same for the same seed.

    A word whose letters can only stand as they do, such as a palindrome reversed, is left out.
    Raises UsageError when no word is left.
    """
    _, shortest, scrambled = KINDS[name]
    draw, made = random.Random(f"{name} {seed}"), list[Example]()
    seen: set[str] = set()
    for word in words:
        if len(made) == count:
            break
        if word in seen or not shortest <= len(word) <= LONGEST or not _WORD.fullmatch(word):
            continue
        seen.add(word)
        # A shuffle that changes nothing is shuffled again, some times.
        tries = (scrambled(word, draw) for _ in range(20))
        if text := next((text for text in tries if text != word), ""):
            made.append(Example(contexts=(f"\n{text} =",), choices=(f" {word}",)))
    if not made:
        raise UsageError(
            f"{source}: no word of {shortest} to {LONGEST} letters a to z for {name}; give a file "
            "with a word a line"
        )
    # The questions come in no order of their own: the first ones of a limit are a fair sample.
    draw.shuffle(made)
    return Task(
        name=name,
        kind="exact",
        examples=tuple(made),
        source=f"made of {source}, seed {seed}",
        instruction=INSTRUCTION,
        headline="exact_match",
        paper_shots=SHOTS,
    )


def read_words(path: Path) -> list[str]:
    """The words of a file, a line each, whatever stands behind a tab or space left out. Raises
    UsageError for a file that cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path}: not readable as a list of words ({error}); give a UTF-8 file with a word a "
            "line, the most frequent first"
        ) from None
    return [words[0] for line in lines if (words := line.split())]
