"""Questions made here have the properties of the files that OpenAI published."""

import random
import re
import statistics
from collections import Counter

import pytest

from megagpt.errors import UsageError
from megagpt.tasks import arithmetic as sums
from megagpt.tasks.catalogue import wanted
from megagpt.tasks.examples import Example, Task, best_guess, prompts
from megagpt.tasks.scramble import INSTRUCTION, KINDS, SYSTEM, read_words, scramble
from tests.lib.corpus import write_corpus

SIGNS = {"plus": "+", "minus": "-", "times": "*"}


def asked(example: Example) -> str:
    found = re.fullmatch(r"\n\nQ: What is (.+)\?\n\nA:", example.contexts[0])
    assert found and example.choices[0][0] == " "
    return found[1]


@pytest.mark.parametrize("name", sums.KINDS)
def test_arithmetic_is_as_published(name):
    task = sums.arithmetic(name)
    assert len(task.examples) == 2000
    questions = [asked(example) for example in (*task.examples, *task.pool)]
    assert len(set(questions)) == len(questions)
    for question, example in zip(questions, task.examples, strict=False):
        if name == "sum_of_digits":
            expected = sum(int(digit) for digit in question if digit.isdigit())
        else:
            for word, sign in SIGNS.items():
                question = question.replace(word, sign)
            expected = eval(question)
        assert example.choices == (f" {expected}",)
    assert sums.arithmetic(name) == task
    assert sums.arithmetic(name, seed=1).examples != task.examples


@pytest.mark.parametrize("digits", range(2, 7))
def test_operands_are_uniform(digits):
    word = ("two", "three", "four", "five", "six")[digits - 2]
    for operation, sign in (("addition", "plus"), ("subtraction", "minus")):
        task = sums.arithmetic(f"{word}_digit_{operation}")
        pairs = [tuple(map(int, asked(e).split(f" {sign} "))) for e in task.examples]
        short = sum(min(pair) < 10 ** (digits - 1) for pair in pairs) / len(pairs)
        assert 0.16 < short < 0.22  # 19%
        numbers = [number for pair in pairs for number in pair]
        assert 0 <= min(numbers) and max(numbers) <= 10**digits - 1
        assert statistics.mean(numbers) == pytest.approx(10**digits / 2, rel=0.04)
        if sign == "minus":
            assert 920 < sum(a < b for a, b in pairs) < 1080


def test_three_operations_are_drawn_alike():
    task = sums.arithmetic("single_digit_three_ops")
    found = [re.fullmatch(r"\((\d) (.) (\d)\) (.) (\d)", asked(e)) for e in task.examples]
    pairs = Counter((match[2], match[4]) for match in found if match)
    assert len(pairs) == 9 and sum(pairs.values()) == 2000
    assert min(pairs.values()) > 175 and max(pairs.values()) < 270
    assert {match[place] for match in found if match for place in (1, 3, 5)} == set("123456789")


def test_the_ten_tasks_of_the_paper():
    found = wanted(["arithmetic"], 0, False)
    assert [task.name for task in found.tasks] == list(sums.PAPER) and len(sums.PAPER) == 10
    assert {task.paper_shots for task in found.tasks} == {50}
    [one] = wanted(["2D+"], 0, False).tasks
    assert one == sums.arithmetic("two_digit_addition")


# --- words ---------------------------------------------------------------------------------------


def words(count: int = 4000) -> list[str]:
    """Words of 3 to 17 letters, all different."""
    draw = random.Random(0)
    letters = "etaoinshrdlu"
    return ["".join(draw.choices(letters, k=draw.randint(3, 17))) for _ in range(count)]


@pytest.mark.parametrize("name", KINDS)
def test_words_are_scrambled_as_published(name):
    label, shortest, _ = KINDS[name]
    task = scramble(name, words(), "here", count=2000)
    assert len(task.examples) == 2000 and task.instruction == INSTRUCTION
    made = {}
    for example in task.examples:
        found = re.fullmatch(r"\n(.+) =", example.contexts[0])
        assert found and example.choices[0][0] == " "
        made[example.choices[0][1:]] = found[1]
    assert len(made) == 2000
    assert {len(word) for word in made} == set(range(shortest, 16))
    for word, text in made.items():
        assert text != word
        if label == "CL":
            assert text in [word[i:] + word[:i] for i in range(1, len(word))]
        elif label in ("A1", "A2"):
            edge = int(label[1])
            assert (text[:edge], text[-edge:]) == (word[:edge], word[-edge:])
            assert sorted(text) == sorted(word)
        elif label == "RI":
            assert text[::2] == word and set(text[1::2]) <= set(" ./!")
        else:
            assert text == word[::-1]
    if label == "RI":
        counts = Counter(letter for text in made.values() for letter in text[1::2])
        assert max(counts.values()) / min(counts.values()) < 1.1
    assert scramble(name, words(), "here", count=2000) == task


def test_the_most_frequent_words_are_taken(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("letters\t90\nhouse\t80\nLondon\t70\nanagram\t60\nredder\t50\nthe 40\n\n")
    assert read_words(path)[:3] == ["letters", "house", "London"]
    task = scramble("reversed_words", read_words(path), str(path), count=2)
    assert {e.choices[0] for e in task.examples} == {" letters", " anagram"}
    # A palindrome reads the same reversed.
    assert len(scramble("reversed_words", read_words(path), str(path)).examples) == 2
    text = ["the anagram and the letters, the letters and the anagram; letters "] * 3
    corpus = write_corpus(tmp_path / "text", text)
    found = wanted([f"scramble={corpus}"], 0, False)
    assert [task.name for task in found.tasks] == list(KINDS)
    assert {e.choices[0] for e in found.tasks[0].examples} == {" letters", " anagram"}


def test_words_that_are_not_there(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"here: no word of 6 to 15 letters a to z for reversed_w"):
        scramble("reversed_words", ["ox"], "here")
    with pytest.raises(UsageError, match="not readable as a list of words .*a word a line"):
        read_words(tmp_path)
    monkeypatch.setattr("megagpt.tasks.scramble.SYSTEM", tmp_path / "absent")
    assert SYSTEM.name == "words"
    with pytest.raises(
        UsageError, match="no list of words at .*absent; give one, as --task cycle_l"
    ):
        wanted(["CL"], 0, False)


# --- prompts -------------------------------------------------------------------------------------


def test_examples_stand_before_a_question_as_far_as_there_is_room():
    task = sums.arithmetic("two_digit_addition").limited(40)
    one = len(task.pool[0].text)
    made = prompts(task, 10, 0, 6 * one, len)
    assert set(made.shots) <= {4, 5} and made.cut == 0
    for k, example, question in zip(made.shots, made.examples, task.asked, strict=True):
        assert example.contexts[0].endswith(question.contexts[0])
        before = example.contexts[0].removesuffix(question.contexts[0])
        parts = [p for p in task.pool if p.text in before]
        assert sum(before.count(p.text) for p in parts) >= k
        assert len(example.contexts[0]) + len(example.choices[0]) <= 6 * one
        assert before == "" or before.startswith("\n\nQ: What is ")
    assert prompts(task, 10, 0, 6 * one, len) == made
    assert prompts(task, 10, 1, 6 * one, len) != made
    assert prompts(task, 2, 0, 10**6, len).shots == [2] * 40
    assert prompts(task, 0, 0, 10**6, len).examples == list(task.asked)
    assert prompts(task, 0, 0, 5, len).cut == 40


def test_a_question_is_no_example_of_itself():
    own = tuple(Example(contexts=(f"\n{n} =",), choices=(f" {n}",)) for n in range(5))
    task = Task(name="x", kind="exact", examples=own, source="", instruction="Copy:")
    made = prompts(task, 4, 0, 10**6, len)
    for number, example in enumerate(made.examples):
        text = example.contexts[0]
        assert text.startswith("Copy:\n")
        assert all(text.count(f"\n{n} = {n}") == (n != number) for n in range(5))
    with pytest.raises(UsageError, match="--shots 5: must be 0 to 4, as many as x has others"):
        prompts(task, 5, 0, 100, len)
    with pytest.raises(UsageError, match="--limit -1: must be 0"):
        task.limited(-1)


def test_what_a_guess_reaches():
    two = Example(contexts=("a",), choices=("b", "c"), gold=1)
    four = Example(contexts=("a",), choices=("b", "c", "d", "e"), gold=1)
    assert best_guess([two, four]) == pytest.approx((1 / 2 + 1 / 4) / 2)
    answers = [Example(contexts=("a",), choices=(text,)) for text in " 7, 7, 8, 9".split(",")]
    assert best_guess(answers) == 0.5
    assert best_guess(sums.arithmetic("two_digit_addition").examples) < 0.02
