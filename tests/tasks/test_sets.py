"""Rows of published sets become the examples that EleutherAI's harness makes of them."""

import gzip
import json
import re

import pytest

from megagpt.errors import UsageError
from megagpt.tasks import sets
from megagpt.tasks.catalogue import wanted

HELLASWAG = {
    "activity_label": "Removing ice from car",
    "ctx_a": "Then, the man writes over the snow [header] How to [title] Wait.",
    "ctx_b": "then the man",
    "endings": [", some  one [step] went", ", a man.", " one [title] two", "x"],
    "label": "3",
}
ARC = {
    "question": "Which is a gas?",
    "choices": {"text": ["iron", "air", "oak"], "label": ["A", "B", "C"]},
    "answerKey": "B",
}
WINOGRANDE = {"sentence": "Ann met Sue because _ was early.", "option1": "Ann", "option2": "Sue"}
STORY = {f"input_sentence_{n}": f"Part {n}." for n in range(1, 5)}


def test_hellaswag_is_cleaned_as_the_harness_does():
    theirs = pytest.importorskip("lm_eval.tasks.hellaswag.utils").preprocess
    found = sets.hellaswag(HELLASWAG)
    context = f"{HELLASWAG['activity_label']}: {HELLASWAG['ctx_a']} Then the man"
    assert found.contexts == (theirs(context),)
    assert found.choices == tuple(theirs(text) for text in HELLASWAG["endings"])
    assert (found.gold, found.between) == (3, " ")


def test_winogrande_is_cut_at_the_gap_as_the_harness_does():
    theirs = pytest.importorskip("lm_eval.tasks.winogrande.preprocess_winogrande")
    row = WINOGRANDE | {"answer": "2"}
    found = sets.winogrande(row)
    assert list(found.contexts) == theirs.doc_to_choice(row)
    assert found.choices == (theirs.doc_to_target(row),) and found.gold == theirs.doc_to_text(row)
    assert found.options == [
        ("Ann met Sue because Ann", " was early."),
        ("Ann met Sue because Sue", " was early."),
    ]


def test_the_other_sets():
    piqa = sets.piqa({"goal": "Open a jar", "sol1": "twist", "sol2": "shout", "label": 0})
    assert piqa.options == [
        ("Question: Open a jar\nAnswer:", " twist"),
        ("Question: Open a jar\nAnswer:", " shout"),
    ]
    arc = sets.arc(ARC)
    assert arc.contexts == ("Question: Which is a gas?\nAnswer:",) and arc.gold == 1
    one, two = ({"text": text, "label": label} for text, label in (("iron", "1"), ("air", "2")))
    raw = {"question": {"stem": "Which is a gas?", "choices": [one, two]}, "answerKey": "2"}
    assert sets.arc(raw).contexts == arc.contexts and sets.arc(raw).gold == 1
    book = sets.openbookqa(ARC | {"question_stem": "A gas is"})
    assert book.contexts == ("A gas is",) and book.choices == arc.choices
    story = STORY | {"sentence_quiz1": "End.", "sentence_quiz2": "No.", "answer_right_ending": 2}
    assert sets.storycloze(story).text == "Part 1. Part 2. Part 3. Part 4. No."
    text = {"text": "She went to her friend Bob"}
    assert sets.lambada(text).options == [("She went to her friend", " Bob")]
    assert sets.lambada_cloze(text).text == "She went to her friend ____. -> Bob"


def test_ones_own_questions(tmp_path):
    rows = [
        {"context": "a", "choices": ["b", "c"], "gold": 1},
        {"context": "a\n", "choices": ["b"], "gold": 0, "between": ""},
    ]
    path = tmp_path / "own.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    task = sets.task_of("choice", str(path))
    assert [e.text for e in task.examples] == ["a c", "a\nb"] and task.kind == "choice"
    partial = tmp_path / "partial.jsonl"
    row = {"context_options": ["he", "she"], "choices": ["ran"], "gold": 1}
    partial.write_text(json.dumps(row) + "\n")
    task = sets.task_of("choice", str(partial))
    assert task.kind == "partial" and task.examples[0].text == "she ran"


def test_openais_own_files(tmp_path):
    path, question = tmp_path / "two_digit_addition.jsonl", "\n\nQ: What is 98 plus 45?\n\nA:"
    path.write_text(json.dumps({"context": question, "completion": " 143"}))
    [task] = wanted([f"2D+={path}"], 0, False).tasks
    assert task.name == "two_digit_addition" and task.paper_shots == 50 and task.separator == ""
    assert task.examples[0].text == question + " 143"
    path.write_text(json.dumps({"context": "\nasinoc =", "completion": " casino"}))
    [task] = wanted([f"CL={path}"], 0, False).tasks
    assert task.instruction.startswith("Please unscramble") and task.paper_shots == 100


def test_the_papers_tasks_of_a_folder(tmp_path):
    (tmp_path / "words.txt").write_text("letters\nanagram\ncasino\n")
    (tmp_path / "arc_easy.jsonl").write_text(json.dumps(ARC))
    (tmp_path / "piqa.jsonl").write_text("{}")
    found = wanted([f"gpt3={tmp_path}"], 0, False)
    names = [task.name for task in found.tasks]
    assert len(names) == 10 + 5 + 1 and names[-1] == "arc_easy"
    assert found.missing["lambada"] == f"no lambada.jsonl in {tmp_path}"
    assert "no row of piqa (no 'sol1')" in found.missing["piqa"]
    with pytest.raises(UsageError, match="gpt3=absent: no folder; give one with lambada.jsonl"):
        wanted(["gpt3=absent"], 0, False)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("lambada", {}, "line 1: no row of lambada (no 'text'); expected {text}: the last word"),
        ("lambada", {"text": "one"}, "expected a text of two words or more"),
        ("winogrande", WINOGRANDE | {"answer": "3"}, "the right answer is none of the choices"),
        ("winogrande", WINOGRANDE | {"sentence": "no gap"}, "text behind a gap _"),
        ("hellaswag", HELLASWAG | {"endings": []}, "expected a list of texts"),
        ("arc_easy", ARC | {"answerKey": "D"}, "no row of arc_easy ('D' is not in list)"),
        ("arc_easy", {"question": "a", "answerKey": "A"}, "no row of arc_easy (no 'choices')"),
        (
            "arc_easy",
            ARC | {"answerKey": "C", "choices": {"text": ["a", "b"], "label": ["A", "B", "C"]}},
            "the right answer is none of the choices",
        ),
        ("choice", {"context": "a", "choices": ["\ud800"], "gold": 0}, "surrogates not allowed"),
        ("choice", {"context": "a", "choices": ["b"], "gold": 1}, "`gold` must be the place of"),
        ("choice", {"context": "a", "choices": ["b", ""], "gold": 0}, "texts that are not empty"),
        (
            "choice",
            {"context": "a", "choices": ["b"], "gold": 0, "between": 1},
            "`between` must be a text",
        ),
        (
            "choice",
            {"context_options": ["a", "b"], "choices": ["c", "d"], "gold": 0},
            "give one choice behind several context_options",
        ),
        ("exact", {"context": "a"}, "no row of exact (no 'completion')"),
        ("exact", [1], "expected an object, found list"),
    ],
)
def test_rows_that_are_none(tmp_path, name, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(UsageError, match=re.escape(message)):
        sets.task_of(name, str(path))


def test_sources_that_are_none(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"absent.jsonl, line 0: not readable \(No such file"):
        sets.task_of("piqa", str(tmp_path / "absent.jsonl"))
    (tmp_path / "deep.jsonl").write_text("[" * 200_000)
    with pytest.raises(UsageError, match=r"deep.jsonl, line 1: not readable \(maximum recursion"):
        sets.task_of("piqa", str(tmp_path / "deep.jsonl"))
    rows = [
        {"context_options": ["a", "b"], "choices": ["x"], "gold": 0},
        {"context": "a", "choices": ["x", "y"], "gold": 0},
    ]
    (tmp_path / "two.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UsageError, match="some rows have several contexts and others have one"):
        sets.task_of("choice", str(tmp_path / "two.jsonl"))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UsageError, match="empty.jsonl: no row in it"):
        sets.task_of("piqa", str(tmp_path / "empty.jsonl"))
    with pytest.raises(UsageError, match="--task storycloze: give a file, as --task storycloze="):
        sets.task_of("storycloze")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match="data set Rowan/hellaswag, config None, split validation"):
        sets.task_of("hellaswag")
    for spec, message in (
        ("nonsense", "--task nonsense: unknown; there are gpt3, arithmetic"),
        ("arithmetic=x", "--task arithmetic: is made here and takes no file"),
        ("text8", "--task text8: give the unpacked file, as --task text8=FILE"),
    ):
        with pytest.raises(UsageError, match=message):
            wanted([spec], 0, False)
    with pytest.raises(UsageError, match="two_digit_addition is asked for twice"):
        wanted(["2D+", "arithmetic"], 0, False)


def test_rows_of_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [ARC, ARC | {"answerKey": "A"}]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "arc"))
    task = sets.task_of("arc_easy", f"hf:{tmp_path / 'arc'}")
    assert [e.gold for e in task.examples] == [1, 0] and task.headline == "acc_unconditional"
