"""Decontamination: which 13-grams go, which are common phrases, and that only the input decides."""

import random
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.corpus import contamination as overlap
from megagpt.corpus import duplicates as duplicates_module
from megagpt.corpus.contamination import (
    COMMON,
    GRAM,
    PIECES,
    WINDOW,
    clean_pieces,
    common,
    enough,
    evaluation_grams,
    shared_grams,
    sightings,
)
from megagpt.corpus.documents import Documents
from megagpt.corpus.duplicates import word_hashes
from megagpt.corpus.pipe import prepare
from megagpt.corpus.recipe import PrepareOptions
from megagpt.errors import DamageError, Stopped, UsageError
from tests.corpus.test_prepare import content, decoded, jsonl

WORDS = [f"w{n}" for n in range(5000)]


def words(draw: random.Random, count: int) -> str:
    return " ".join(draw.choices(WORDS, k=count))


def by_hand(text: str, wanted: set[tuple[str, ...]]) -> list[str]:
    """The rules of appendix C, word by word."""
    found = list(re.finditer(r"\w+", text.lower()))
    marks = [False] * len(text)
    for place in range(len(found) - GRAM + 1):
        gram = found[place : place + GRAM]
        if tuple(match.group() for match in gram) in wanted:
            for at in range(max(gram[0].start() - WINDOW, 0), gram[-1].end() + WINDOW):
                if at < len(text):
                    marks[at] = True
    if not any(marks):
        return [text]
    pieces = ["".join(c if not m else "\0" for c, m in zip(text, marks, strict=True))]
    pieces = re.split("\0+", pieces[0])
    return [piece for piece in pieces if len(piece) >= WINDOW] if len(pieces) <= PIECES else []


def grams_of(text: str) -> set[tuple[str, ...]]:
    found = re.findall(r"\w+", text.lower())
    return {tuple(found[n : n + GRAM]) for n in range(len(found) - GRAM + 1)}


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), slice_=st.sampled_from([1, 50, 1 << 20]))
def test_pieces_are_those_of_the_paper(
    tmp_path_factory: pytest.TempPathFactory, seed: int, slice_: int
) -> None:
    """However small the slices in which a text is read."""
    draw = random.Random(seed)
    folder = tmp_path_factory.getbasetemp()
    question = words(draw, draw.randint(13, 40))
    (folder / "eval.txt").write_text(question)
    text = ""
    for _ in range(draw.randint(1, 8)):
        text += words(draw, draw.randint(0, 150)) + draw.choice([" ", ", ", "\n"])
        first = draw.randint(0, 10)
        text += " ".join(question.split()[first : draw.randint(first, 45)]).upper() + " -- "
    grams = evaluation_grams([str(folder / "eval.txt")], "text")
    before, overlap.SLICE = overlap.SLICE, slice_
    try:
        assert clean_pieces(text, grams) == by_hand(text, grams_of(question))
        assert len(grams) == len(grams_of(question))
        assert len(shared_grams(text, grams)) == len(grams_of(text) & grams_of(question))
    finally:
        overlap.SLICE = before


@settings(max_examples=60, deadline=None)
@given(
    seen=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 20)), max_size=120),
    cuts=st.lists(st.integers(0, 120), max_size=4),
)
def test_common_grams_do_not_depend_on_how_they_are_counted(
    seen: list[tuple[int, int]], cuts: list[int]
) -> None:
    documents = [{document for place, document in seen if place == n} for n in range(4)]
    expected = [n for n in range(4) if len(documents[n]) > COMMON]
    one_by_one = [sightings(np.array([place]), document) for place, document in seen]
    parts, bounds = [np.zeros(0, np.uint64)], [0, *sorted(cuts), len(seen)]
    for first, last in zip(bounds, bounds[1:], strict=False):
        parts.append(enough(np.concatenate([np.zeros(0, np.uint64), *one_by_one[first:last]])))
    assert all(
        np.bincount((p >> np.uint64(32)).astype(int)).max() <= COMMON + 1
        for p in parts[1:]
        if len(p)
    )
    assert common(np.concatenate(parts)).tolist() == expected


def test_evaluation_text_is_cut_out(tmp_path: Path) -> None:
    draw = random.Random(4)
    question = words(draw, 20)
    (tmp_path / "eval.txt").write_text(question.upper().replace(" ", ", "))
    clean, left, right = (words(draw, 300) for _ in range(3))
    short = f"few words {question} and few more"
    torn = " ".join(f"{clean} {question}" for _ in range(PIECES))
    near = f"{clean} {' '.join(question.split()[:12])}"
    path = jsonl(tmp_path / "in.jsonl", [clean, f"{left} {question} {right}", short, torn, near])
    options = PrepareOptions(output=tmp_path / "out", decontaminate=(str(tmp_path / "eval.txt"),))
    summary = prepare([path], options)
    cut = [left[: len(left) + 1 - WINDOW], (" " + right)[WINDOW:]]
    assert decoded(tmp_path / "out") == [clean, *cut, near]
    assert summary.left_out == {"evaluation text": 2}
    assert summary.notes == {"evaluation text cut out": 1}


@pytest.fixture
def phrases(tmp_path: Path) -> tuple[list[str], tuple[str, ...], list[str]]:
    """Documents with a phrase of 11 of them, one of 10, and one of a page that was copied 12
    times; the evaluation files that hold the phrases; and the phrases."""
    draw = random.Random(5)
    held = [words(draw, GRAM) for _ in range(3)]
    texts = [f"{words(draw, 100)} {held[0]} {words(draw, 100)}" for _ in range(COMMON + 1)]
    texts += [f"{words(draw, 100)} {held[1]} {words(draw, 100)}" for _ in range(COMMON)]
    texts += [f"{words(draw, 100)} {held[2]} {words(draw, 100)}"] * (COMMON + 2)
    draw.shuffle(texts)
    for n, phrase in enumerate(held):
        (tmp_path / f"eval{n}.txt").write_text(phrase)
    return texts, tuple(str(tmp_path / f"eval{n}.txt") for n in range(3)), held


def test_phrases_of_more_than_ten_documents_stay(
    tmp_path: Path, phrases: tuple[list[str], tuple[str, ...], list[str]]
) -> None:
    """The same for any workers and units; and copies count once."""
    texts, files, held = phrases
    path = jsonl(tmp_path / "in.jsonl", texts)
    outputs = []
    for workers, unit_bytes in ((1, 1 << 20), (2, 700), (7, 3000)):
        output = tmp_path / f"{workers}" / "out"
        options = PrepareOptions(
            output=output, decontaminate=files, workers=workers, unit_bytes=unit_bytes,
            validation_fraction=0.2, backend="tiktoken",
        )  # fmt: skip
        summary = prepare([path], options)
        assert summary.notes["13-grams of evaluation files left as common"] == 1
        assert summary.notes["evaluation text cut out"] == COMMON + COMMON + 2
        outputs.append((content(output), content(output.with_name("out-validation"))))
    assert outputs[0] == outputs[1] == outputs[2]
    found = [*decoded(tmp_path / "1/out"), *decoded(tmp_path / "1/out-validation")]
    assert [sum(phrase in text for text in found) for phrase in held] == [COMMON + 1, 0, 0]


@pytest.mark.parametrize("readings", [0, 1])
def test_a_stop_in_either_pass_changes_nothing(
    tmp_path: Path, phrases: tuple[list[str], tuple[str, ...], list[str]], readings: int
) -> None:
    texts, files, _ = phrases

    def options(name: str) -> PrepareOptions:
        return PrepareOptions(
            output=tmp_path / name, decontaminate=files, unit_bytes=2000, backend="tiktoken"
        )

    left = [readings]

    def stops() -> Iterator[str]:
        yield from texts[:20]
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        yield from texts[20:]

    prepare([Documents("mine", lambda: texts)], options("calm/out"))
    with pytest.raises(Stopped, match="run the same command again to continue"):
        prepare([Documents("mine", stops)], options("out"))
    assert (tmp_path / "out/.preparation/rare.grams").exists() == bool(readings)
    prepare([Documents("mine", lambda: texts)], options("out"))
    assert content(tmp_path / "out") == content(tmp_path / "calm/out")


def test_an_input_that_reads_differently_the_second_time_is_refused(tmp_path: Path) -> None:
    (tmp_path / "eval.txt").write_text(words(random.Random(1), 20))
    once = iter(["first", "second"])
    options = PrepareOptions(output=tmp_path / "out", decontaminate=(str(tmp_path / "eval.txt"),))
    with pytest.raises(UsageError, match="had read other documents from this input"):
        prepare([Documents("mine", lambda: once)], options)
    standard = PrepareOptions(output=tmp_path / "other", decontaminate=("-",))
    for source, asked in (("-", options), (tmp_path / "eval.txt", standard)):
        with pytest.raises(UsageError, match="reads its input twice, which standard input does"):
            prepare([source], asked)


def test_word_hashes_do_not_depend_on_what_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    row = [*"abcab", "long" * 20, *"cba"]
    expected = word_hashes(row)
    assert len(set(expected.tolist())) == len(set(row))
    monkeypatch.setattr(duplicates_module, "_REMEMBERED", 2)
    assert word_hashes(row).tolist() == word_hashes(row).tolist() == expected.tolist()


def test_other_evaluation_text_is_another_corpus(tmp_path: Path) -> None:
    (tmp_path / "evaluation").mkdir()
    file = tmp_path / "evaluation/a.txt"
    file.write_text(words(random.Random(1), 20))
    path = jsonl(tmp_path / "in.jsonl", ["some text"])
    options = PrepareOptions(output=tmp_path / "out", decontaminate=(str(tmp_path / "evaluation"),))
    prepare([path], options)
    assert prepare([path], options).finished_before
    file.write_text(words(random.Random(2), 20))
    with pytest.raises(UsageError, match="already holds another corpus .decontaminate was"):
        prepare([path], options)


def test_an_evaluation_folder_with_files_that_are_not_read_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "evaluation"
    folder.mkdir()
    for name in ("a.txt", "b.csv"):
        (folder / name).write_text(words(random.Random(1), 20))
    told = rf"1 in there have endings that are not known, such as {folder}/b.csv; name the files"
    with pytest.raises(UsageError, match=told):
        evaluation_grams((str(folder),), "text")
    assert len(evaluation_grams((f"{folder}/*.txt",), "text")) == 8


def test_letters_that_grow_and_lone_surrogates() -> None:
    grams = np.array([1], np.uint64)
    for text in ("\u0130stanbul " * 20, "\ud800 x " * 20, "", "a" * 100):
        assert clean_pieces(text, grams) == [text]


def test_evaluation_files_need_text(tmp_path: Path) -> None:
    (tmp_path / "eval.txt").write_text("too short")
    with pytest.raises(UsageError, match="eval.txt: no text of 13 words"):
        evaluation_grams([str(tmp_path / "eval.txt")], "text")


def test_evaluation_text_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    good = " ".join(WORDS[:40])
    for name, damaged in {
        "a.jsonl": f'{{"text": "{good}"}}\n{{"text": "lost'.encode(),
        "b.txt": good.encode() + b"\xff",
        "c.json": f'["{good}", nope]'.encode(),
    }.items():
        path = tmp_path / name
        path.write_bytes(damaged)
        with pytest.raises(DamageError, match=f"file .*{name}: .*; repair it, or leave it out"):
            evaluation_grams([str(path)], "text")
    (tmp_path / "d").mkdir()
    (tmp_path / "d/e.txt").symlink_to("nowhere")
    with pytest.raises(DamageError, match="d/e.txt: unreadable file; repair it"):
        evaluation_grams([str(tmp_path / "d")], "text")
