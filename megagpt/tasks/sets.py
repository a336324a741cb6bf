"""Published sets of questions: rows of a file or of Hugging Face's `datasets`, as examples.

Each set has one function that makes an example of a row, by the keys that its publishers use.
What a context looks like is what EleutherAI's harness makes of it, unless said otherwise.
"""

import gzip
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megagpt.corpus.huggingface import open_dataset, parse_address
from megagpt.errors import UsageError
from megagpt.tasks.examples import Example, Task

Row = dict[str, Any]


def rows_of(source: str) -> Iterator[tuple[str, Row]]:
    """(where it is, row) of a file of JSON lines, perhaps with .gz, or of an address
    hf:NAME[/CONFIG][:SPLIT].

    Raises UsageError for a source that cannot be opened, or a line that is no object.
    """
    if source.startswith("hf:"):
        for number, row in enumerate(open_dataset(*parse_address(source)), 1):
            yield f"{source}, row {number}", row
        return
    path = Path(source)
    number = 0
    try:
        with (
            gzip.open(path, "rt", encoding="utf-8")
            if path.suffix == ".gz"
            else path.open(encoding="utf-8") as file
        ):
            for number, line in enumerate(file, 1):  # noqa: B007 (told below)
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError(f"expected an object, found {type(row).__name__}")
                    yield f"{path}, line {number}", row
    except (OSError, ValueError, EOFError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UsageError(
            f"{path}, line {number}: not readable ({reason}); give a UTF-8 file with a JSON object "
            "a line, or hf:NAME[/CONFIG][:SPLIT]"
        ) from None


# --- one row ------------------------------------------------------------------------------------


def _texts(value: Any) -> tuple[str, ...]:
    """A list of texts, none of them empty. Raises ValueError for anything else."""
    if not isinstance(value, list | tuple) or not value:
        raise ValueError("expected a list of texts")
    if not all(isinstance(text, str) and text for text in value):
        raise ValueError("expected texts that are not empty")
    for text in value:
        text.encode()  # half of a pair of surrogates is no text
    return tuple(value)


def exact(row: Row) -> Example:
    """{context, completion}: the completion follows directly, as in OpenAI's files."""
    return Example(contexts=_texts([row["context"]]), choices=_texts([row["completion"]]))


def generic(row: Row) -> Example:
    """{context, choices, gold} or {context_options, choices: [one], gold}.

    A choice follows its context behind a space, or what `between` says.
    """
    contexts = (
        _texts(row["context_options"]) if "context_options" in row else _texts([row["context"]])
    )
    choices = _texts(row["choices"])
    between, gold = row.get("between", " "), row["gold"]
    if not isinstance(between, str):
        raise ValueError("`between` must be a text")
    if len(contexts) > 1 and len(choices) > 1:
        raise ValueError("give one choice behind several context_options")
    if type(gold) is not int or not 0 <= gold < max(len(contexts), len(choices)):
        raise ValueError("`gold` must be the place of the right answer, from 0")
    return Example(contexts=contexts, choices=choices, gold=gold, between=between)


def _question(context: str, choices: list[str], gold: int) -> Example:
    """Choices behind a space, of which the one at the place `gold` is right."""
    texts = _texts(choices)
    return Example(contexts=(context,), choices=texts, gold=_place(gold, texts), between=" ")


def lambada(row: Row) -> Example:
    """{text}: the last word follows the rest."""
    context, space, word = row["text"].strip().rpartition(" ")
    if not space:
        raise ValueError("expected a text of two words or more")
    return _question(context, [word], 0)


def lambada_cloze(row: Row) -> Example:
    """The paper's form with examples before it: a gap, and the word behind an arrow."""
    plain = lambada(row)
    return replace(plain, contexts=(f"{plain.contexts[0]} ____. ->",))


def _without_headings(text: str) -> str:
    """A text of WikiHow without its marks of headings and steps."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def hellaswag(row: Row) -> Example:
    """{activity_label, ctx_a, ctx_b, endings, label}."""
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    endings = [_without_headings(ending) for ending in row["endings"]]
    return _question(_without_headings(context), endings, int(row["label"]))


def piqa(row: Row) -> Example:
    """{goal, sol1, sol2, label}."""
    choices = [row["sol1"], row["sol2"]]
    return _question(f"Question: {row['goal']}\nAnswer:", choices, int(row["label"]))


def arc(row: Row) -> Example:
    """{question, choices: {text, label}, answerKey}, or AI2's own file with the choices within
    `question`."""
    question, choices = row["question"], row.get("choices")
    if isinstance(question, dict):
        choices = {key: [one[key] for one in question["choices"]] for key in ("text", "label")}
        question = question["stem"]
    if choices is None:
        raise KeyError("choices")
    gold = list(choices["label"]).index(row["answerKey"])
    return _question(f"Question: {question}\nAnswer:", choices["text"], gold)


def openbookqa(row: Row) -> Example:
    """{question_stem, choices: {text, label}, answerKey}: the choice ends the sentence."""
    if "question_stem" in row:
        row = row | {"question": row["question_stem"]}
    found = arc(row)
    context = found.contexts[0].removeprefix("Question: ").removesuffix("\nAnswer:")
    return replace(found, contexts=(context,))


def winogrande(row: Row) -> Example:
    """{sentence with _, option1, option2, answer}: what is behind the gap is scored after each."""
    before, gap, behind = row["sentence"].partition("_")
    if not gap or not behind.strip():
        raise ValueError("expected a sentence with text behind a gap _")
    contexts = _texts([before + row["option1"], before + row["option2"]])
    gold = _place(int(row["answer"]) - 1, contexts)
    return Example(contexts=contexts, choices=(behind.strip(),), gold=gold, between=" ")


def storycloze(row: Row) -> Example:
    """{input_sentence_1 to 4, sentence_quiz1, sentence_quiz2, answer_right_ending}."""
    story = " ".join(row[f"input_sentence_{number}"] for number in range(1, 5))
    endings = [row["sentence_quiz1"], row["sentence_quiz2"]]
    return _question(story, endings, int(row["answer_right_ending"]) - 1)


def _place(number: int, among: tuple[str, ...]) -> int:
    if not 0 <= number < len(among):
        raise ValueError("the right answer is none of the choices (a test set without answers?)")
    return number


# --- the sets -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """How the rows of a set are read and scored."""

    read: Callable[[Row], Example]
    hub: str
    """Where `datasets` finds it; "": nowhere."""
    headline: str
    """The figure that the GPT-3 paper gives."""
    quoted: str = "acc_norm"
    """The figure that others give."""
    kind: str = "choice"


SETS = {
    "lambada": QuestionSet(
        lambada, "hf:EleutherAI/lambada_openai/default:test", "accuracy", "accuracy", "word"
    ),
    "hellaswag": QuestionSet(hellaswag, "hf:Rowan/hellaswag:validation", "acc_tokens"),
    "piqa": QuestionSet(piqa, "hf:baber/piqa:validation", "acc_tokens"),
    "arc_easy": QuestionSet(arc, "hf:allenai/ai2_arc/ARC-Easy:test", "acc_unconditional"),
    "arc_challenge": QuestionSet(arc, "hf:allenai/ai2_arc/ARC-Challenge:test", "acc_unconditional"),
    "openbookqa": QuestionSet(openbookqa, "hf:allenai/openbookqa/main:test", "acc_unconditional"),
    "winogrande": QuestionSet(
        winogrande, "hf:allenai/winogrande/winogrande_xl:validation", "acc", "acc", "partial"
    ),
    "storycloze": QuestionSet(storycloze, "", "acc_tokens", "acc"),
    "choice": QuestionSet(generic, "", "acc"),
    "exact": QuestionSet(exact, "", "exact_match", "exact_match", "exact"),
}
"""The sets that are read by name; the last two are anyone's own."""


def task_of(name: str, source: str = "", gapped: bool = False, form: str = "") -> Task:
    """The task of a set, from its source or from where `datasets` finds it.

    gapped: LAMBADA in the form with a gap. form: the set whose rows these are, where another task
    has them. Raises UsageError for a row that is not as the set's are, and for a source without
    one.
    """
    entry = SETS[form or name]
    source = source or entry.hub
    if not source:
        raise UsageError(f"--task {name}: give a file, as --task {name}=FILE.jsonl")
    read = lambada_cloze if gapped and name == "lambada" else entry.read
    examples = []
    for where, row in rows_of(source):
        try:
            examples.append(read(row))
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            rule = (entry.read.__doc__ or "").split("\n")[0].rstrip(".")
            raise UsageError(f"{where}: no row of {name} ({reason}); expected {rule}") from None
    if not examples:
        raise UsageError(f"{source}: no row in it; give a file with a JSON object a line")
    kind, several = entry.kind, [len(example.contexts) > 1 for example in examples]
    if any(several) and not all(several) and kind == "choice":
        raise UsageError(
            f"{source}: some rows have several contexts and others have one, and are scored in "
            "different ways; give each kind a file of its own"
        )
    if kind == "choice" and all(several):
        kind = "partial"
    # OpenAI's contexts begin with the end of a line.
    separator = "" if kind == "exact" else "\n" if gapped else "\n\n"
    return Task(
        name=name,
        kind=kind,
        examples=tuple(examples),
        source=source,
        separator=separator,
        headline=entry.headline if kind == entry.kind else "acc",
        quoted=entry.quoted if kind == entry.kind else "acc",
    )
