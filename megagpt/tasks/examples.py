"""What a task is: examples, and how their text becomes a prompt with K of them before it (stdlib).

An example has contexts and choices. One context and several choices: which choice follows it?
Several contexts and one choice: after which does it follow (partial scoring, as Winogrande's)? One
of each: does the model say it?
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from megagpt.errors import UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One question of a task. A choice stands right behind its context, with what lies between."""

    contexts: tuple[str, ...]
    choices: tuple[str, ...]
    gold: int = 0
    """The right one of the contexts or choices, from 0."""
    between: str = ""
    """What stands between a context and a choice; no part of the choice's length."""

    @property
    def options(self) -> list[tuple[str, str]]:
        """(context, continuation) of every possible answer."""
        behind = [self.between + choice for choice in self.choices]
        if len(self.contexts) > 1:
            return [(context, behind[0]) for context in self.contexts]
        return [(self.contexts[0], choice) for choice in behind]

    @property
    def text(self) -> str:
        """The example with its right answer, as it stands before a question."""
        return "".join(self.options[self.gold])

    def after(self, text: str) -> "Example":
        """The same with a text before its contexts."""
        return replace(self, contexts=tuple(text + context for context in self.contexts))


SCORINGS = {
    "exact": "greedy text up to the end of the line, stripped, equal to the answer",
    "choice": "the choice that the model finds most likely",
    "partial": "the context after which the rest of the sentence is most likely",
    "word": "last word, every token of it the likeliest (EleutherAI's harness)",
    "token": "last token of the passage the likeliest (GPT-2's table)",
    "stopword": "last token of the passage the likeliest that is no stop word",
}
"""How answers are judged, by kind."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Examples that are scored alike."""

    name: str
    kind: str
    """A key of SCORINGS."""
    examples: tuple[Example, ...]
    pool: tuple[Example, ...] = ()
    """Where the examples before a question come from; empty: from the other questions."""
    source: str
    """Where the examples are from."""
    instruction: str = ""
    """Stands before everything."""
    separator: str = ""
    """Stands behind each example before a question."""
    unconditional: str = "Answer:"
    """The context that GPT-3 weighs a choice against."""
    headline: str = "accuracy"
    """The figure that the GPT-3 paper gives."""
    quoted: str = ""
    """The figure that others give."""
    paper_shots: int = 0
    """K of the paper."""

    limit: int = 0
    """Questions that are asked, the first ones; 0: all."""

    @property
    def asked(self) -> tuple[Example, ...]:
        """The questions."""
        return self.examples[: self.limit or None]

    @property
    def most_shots(self) -> int:
        """As many examples as there are to stand before a question."""
        return len(self.pool) or len(self.examples) - 1

    def limited(self, limit: int) -> "Task":
        """The same with so many questions; all examples may still stand before them."""
        if limit < 0:
            raise UsageError(f"--limit {limit}: must be 0 (all examples) or more")
        return replace(self, limit=limit)


@dataclass(frozen=True, slots=True)
class Prompts:
    """The examples of a task with others before them."""

    examples: list[Example]
    shots: list[int]
    """K of each."""
    cut: int
    """Examples that do not fit into the context even alone: their beginning is not seen."""


def prompts(task: Task, shots: int, seed: int, room: int, count: Callable[[str], int]) -> Prompts:
    """Each example behind K others: `shots`, or as many of these as leave the longest answer
    within `room` tokens; `count` gives the tokens of a text.

    The others are drawn anew for each question, from its number and the seed alone. Raises
    UsageError for K below 0 or beyond what there is to draw from.
    """
    pool = task.pool or task.examples
    if not 0 <= shots <= task.most_shots:
        raise UsageError(
            f"--shots {shots}: must be 0 to {task.most_shots}, as many as {task.name} has others "
            "to draw from"
        )
    sizes = [count(example.text + task.separator) for example in pool] if shots else []
    made, ks, cut = [], [], 0
    for number, example in enumerate(task.asked):
        drawn = _drawn(task, number, shots, seed, len(pool))
        used = sum(count(text) for text in (task.instruction, _longest(example)))
        # As many of the first as fit together.
        k = sum(size <= room - used for size in accumulate(sizes[place] for place in drawn))
        texts = [pool[place].text + task.separator for place in drawn]
        # Tokens of parts may add up to fewer than those of the whole.
        while k and count(task.instruction + "".join(texts[:k]) + _longest(example)) > room:
            k -= 1
        cut += used > room
        made.append(example.after(task.instruction + "".join(texts[:k])))
        ks.append(k)
    return Prompts(made, ks, cut)


def _drawn(task: Task, number: int, shots: int, seed: int, size: int) -> list[int]:
    """Places in the pool, all different, the question's own not among them."""
    draw = random.Random(f"{task.name} {seed} {number}")
    if task.pool:
        return draw.sample(range(size), shots)
    return [place + (place >= number) for place in draw.sample(range(size - 1), shots)]


def _longest(example: Example) -> str:
    return max(map("".join, example.options), key=len)


def best_guess(examples: Sequence[Example]) -> float:
    """Accuracy of who has not read the questions: one over the number of options; with one option
    the share of the answer that is right most often."""
    if any(len(example.options) > 1 for example in examples):
        return sum(1 / len(example.options) for example in examples) / len(examples)
    answers = Counter(example.choices[0] for example in examples)
    return max(answers.values()) / len(examples)


def choices_of(examples: Sequence[Example]) -> Iterator[tuple[str, str]]:
    """(context, continuation) of every option of every example, in order."""
    for example in examples:
        yield from example.options
