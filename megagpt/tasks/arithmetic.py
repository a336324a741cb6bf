"""GPT-3's arithmetic, made by its rules (Brown et al. 2020, section 3.9.1; stdlib).

The forms and the ranges are those of the files that OpenAI published. Operands are uniform in 0
to 10^D - 1, so that some have fewer digits than D; no question occurs twice. The three numbers of
"1DC" are 1 to 9, and the brackets always hold the first two.
"""

import random
from collections.abc import Callable, Iterator
from operator import add, mul, sub

from megagpt.tasks.examples import Example, Task

COUNT = 2000
"""Instances of each task, as in the paper."""
POOL = 500
"""Further ones that stand before questions as examples."""
SHOTS = 50
_OPERATIONS = (("+", add), ("-", sub), ("*", mul))
_DIGITS = ("two", "three", "four", "five", "six")


Kind = tuple[str, tuple[range, ...], Callable[..., tuple[str, int]]]
"""(the paper's short name, what the numbers of a question are drawn from: an operation by its
place; numbers -> (question, answer))."""


def _two(word: str, operation: Callable[[int, int], int]) -> Callable[[int, int], tuple[str, int]]:
    return lambda a, b: (f"{a} {word} {b}", operation(a, b))


def _combined(a: int, b: int, c: int, first: int, second: int) -> tuple[str, int]:
    (sign, inner), (other, outer) = _OPERATIONS[first], _OPERATIONS[second]
    return f"({a} {sign} {b}) {other} {c}", outer(inner(a, b), c)


def _digit_sum(number: int) -> tuple[str, int]:
    return f"the sum of the digits of the number {number}", sum(map(int, str(number)))


def _kinds() -> Iterator[tuple[str, Kind]]:
    for digits, word in enumerate(_DIGITS, 2):
        numbers = (range(10**digits),) * 2
        yield f"{word}_digit_addition", (f"{digits}D+", numbers, _two("plus", add))
        yield f"{word}_digit_subtraction", (f"{digits}D-", numbers, _two("minus", sub))
    one, signs = range(1, 10), range(3)
    yield "two_digit_multiplication", ("2Dx", (range(100),) * 2, _two("times", mul))
    yield "single_digit_three_ops", ("1DC", (one, one, one, signs, signs), _combined)
    yield "sum_of_digits", ("SD", (range(10_000),), _digit_sum)


KINDS: dict[str, Kind] = dict(_kinds())
LABELS = {label: name for name, (label, _, _) in KINDS.items()}
"""The paper's names of the tasks -> ours, which are those of OpenAI's files."""
PAPER = tuple(LABELS[label] for label in ("2D+ 2D- 3D+ 3D- 4D+ 4D- 5D+ 5D- 2Dx 1DC".split()))
"""The ten tasks of the paper, in its order."""


def arithmetic(name: str, seed: int = 0, count: int = COUNT) -> Task:
    """A task of KINDS; the same for the same seed."""
    (_, ranges, ask), draw = KINDS[name], random.Random(f"{name} {seed}")
    asked: dict[str, int] = {}
    while len(asked) < count + POOL:
        question, answer = ask(*(draw.choice(numbers) for numbers in ranges))
        asked[question] = answer
    examples = tuple(
        Example(contexts=(f"\n\nQ: What is {question}?\n\nA:",), choices=(f" {answer}",))
        for question, answer in asked.items()
    )
    return Task(
        name=name,
        kind="exact",
        examples=examples[:count],
        pool=examples[count:],
        source=f"made here, seed {seed}",
        headline="exact_match",
        paper_shots=SHOTS,
    )
