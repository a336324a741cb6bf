"""A task, scored: prompts through the model, and figures with their intervals (numpy)."""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import tiktoken
from numpy.typing import NDArray

from megagpt.corpus.progress import Progress
from megagpt.errors import UsageError
from megagpt.tasks.examples import SCORINGS, Example, Prompts, Task, best_guess, choices_of, prompts
from megagpt.use.evaluate import CONFIDENCE, Estimate
from megagpt.use.likelihood import Likelihood, Pair, Scorer
from megagpt.use.options import TextOptions
from megagpt.use.score import ratio

SLACK = 8
"""Tokens beyond an answer's own that a text may have before it is taken for another."""

STOPWORDS = frozenset(Path(__file__).with_name("stopwords.txt").read_text().split())
"""English words of grammar, which end no passage of LAMBADA: GPT-2's filter leaves them out. The
GPT-2 paper (section 3.3) does not print its list. This one holds articles, pronouns, prepositions,
conjunctions, auxiliaries and a few adverbs."""
Floats = NDArray[np.float64]
Correct = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskOptions:
    """How prompts are made."""

    shots: int | None = 0
    """Examples before each question; None: as many as in the paper."""
    seed: int = 0
    """Decides which examples stand before which question."""
    begin: bool = False
    """A prompt begins with END-OF-DOCUMENT, as a document does."""
    lambada: str = "word"
    """How LAMBADA is scored: word, token or stopword."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskResult:
    """What the model makes of one task."""

    task: str
    source: str
    scoring: str
    """How answers are judged, in words."""
    examples: int
    shots: tuple[int, int]
    """Fewest and most examples before a question."""
    cut: int
    """Questions whose beginning the model does not see."""
    headline: str
    """The figure that the GPT-3 paper gives."""
    quoted: str = ""
    """The figure that others give, as EleutherAI's tables."""
    chance: float
    """Accuracy of the best guess without reading the question."""
    figures: dict[str, Estimate]
    """By name. Accuracies are 0 to 1; perplexity is exp of the mean nats of an answer."""
    correct: Correct = field(repr=False)
    """(examples,) whether the headline's answer is right."""
    parts: dict[str, tuple[int, Estimate]] = field(default_factory=dict)
    """The headline's accuracy on some of the examples, with their number."""


def score_task(scorer: Scorer, task: Task, options: TaskOptions) -> TaskResult:
    """The model's answers to a task. Raises UsageError for options that make no sense."""
    if task.kind == "word":
        task = replace(task, kind=options.lambada)
    shots = min(task.paper_shots, task.most_shots) if options.shots is None else options.shots
    room = scorer.n_ctx - options.begin - SLACK
    if room < 1:
        raise UsageError(
            f"n_ctx {scorer.n_ctx}: a task needs a context of {SLACK + options.begin + 1} or more "
            "tokens; train with a larger model.n_ctx"
        )
    made = prompts(task, shots, options.seed, room, lambda text: len(scorer.encode(text)))
    judge = {"exact": _exact, "choice": _choice, "partial": _partial}.get(task.kind, _word)
    figures, correct = judge(scorer, task, made, options)
    # A file of one's own may hold no task of the paper.
    headline = task.headline if task.headline in figures else next(iter(figures))
    return TaskResult(
        task=task.name,
        source=task.source,
        scoring=SCORINGS[task.kind],
        examples=len(task.asked),
        shots=(min(made.shots), max(made.shots)),
        cut=made.cut,
        headline=headline,
        quoted=task.quoted,
        # Of all questions: of three any answer would be frequent.
        chance=best_guess(task.examples),
        figures=figures,
        correct=correct,
    )


def proportion(correct: Sequence[bool] | Correct) -> Estimate:
    """Share of what is right, with Wilson's interval (Wilson 1927), which holds near 0 and 1 too;
    NaN of nothing."""
    n, hits = len(correct), float(np.sum(correct))
    if not n:
        return Estimate(math.nan, math.nan, math.nan)
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    share = hits / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    reach = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # Rounding may leave 1e-17 beyond what can be.
    return Estimate(share, max(0.0, middle - reach), min(1.0, middle + reach))


def _pairs(scorer: Scorer, examples: Sequence[Example], begin: bool) -> list[Pair]:
    """Of every option of every example, in order."""
    pairs = [scorer.pair(*option) for option in choices_of(examples)]
    return [([scorer.end] * begin + context, after) for context, after in pairs]


def _likelihoods(
    scorer: Scorer, task: Task, pairs: list[Pair], banned: Sequence[int] = ()
) -> list[Likelihood]:
    with Progress(f"scoring {task.name}", len(pairs), "answers") as progress:
        return scorer.likelihoods(pairs, progress.add, banned)


# --- the answer itself ---------------------------------------------------------------------------


def _exact(
    scorer: Scorer, task: Task, made: Prompts, options: TaskOptions
) -> tuple[dict[str, Estimate], Correct]:
    """Greedy texts, and the likelihood of the answers."""
    answers = [example.options[example.gold][1].strip() for example in made.examples]
    pairs = _pairs(scorer, made.examples, options.begin)
    found = _likelihoods(scorer, task, pairs)
    start = [scorer.end] * options.begin
    asked = [start + scorer.encode(example.contexts[0]) for example in made.examples]
    how = [
        TextOptions(temperature=0.0, max_tokens=len(after) + SLACK, stop_texts=("\n",))
        for _, after in pairs
    ]

    def ended(number: int, text: str) -> bool:
        """Whether nothing that follows can change the verdict."""
        return not answers[number].startswith(text.strip())

    with Progress(f"asking {task.name}", len(asked), "questions") as progress:
        texts = scorer.texts(asked, how, ended, progress.add)
    correct = np.array([text.strip() == a for text, a in zip(texts, answers, strict=True)])
    figures = {
        "exact_match": proportion(correct),
        # What EleutherAI's harness calls acc: it does not look for the end of the answer.
        "acc": proportion([one.greedy for one in found]),
        "perplexity": _perplexity(found),
    }
    return figures, correct


def _word(
    scorer: Scorer, task: Task, made: Prompts, options: TaskOptions
) -> tuple[dict[str, Estimate], Correct]:
    """The last word, or the last token of the passage."""
    pairs = _pairs(scorer, made.examples, options.begin)
    banned: list[int] = []
    if task.kind != "word":
        pairs = [([*context, *after[:-1]], after[-1:]) for context, after in pairs]
    if task.kind == "stopword":
        banned = stopword_ids(scorer.encoding)
    found = _likelihoods(scorer, task, pairs, banned)
    correct = np.array([one.greedy for one in found])
    return {"accuracy": proportion(correct), "perplexity": _perplexity(found)}, correct


def stopword_ids(encoding: tiktoken.Encoding) -> list[int]:
    """The tokens of an encoding that are such a word, or hold no letter or digit at all."""
    found = []
    for token, rank in encoding._mergeable_ranks.items():
        text = token.decode("utf-8", errors="replace")
        if text.strip().lower() in STOPWORDS or not re.search(r"\w", text):
            found.append(rank)
    return sorted(found)


def _perplexity(found: Sequence[Likelihood]) -> Estimate:
    """exp of the mean nats of an answer (not of a token)."""
    nats = np.array([-one.logprob for one in found])
    return ratio(nats, np.ones(len(nats))).mapped(lambda value: math.exp(min(value, 700.0)))


# --- one of several ------------------------------------------------------------------------------


def _choice(
    scorer: Scorer, task: Task, made: Prompts, options: TaskOptions
) -> tuple[dict[str, Estimate], Correct]:
    """Every choice, by itself and under each normalisation."""
    pairs = _pairs(scorer, made.examples, options.begin)
    # The choice alone, behind a context that fits any: how likely is it anyway?
    alone = [scorer.pair(task.unconditional, after) for _, after in choices_of(made.examples)]
    alone = [([scorer.end] * options.begin + context, after) for context, after in alone]
    found = _likelihoods(scorer, task, pairs + alone)
    logprob = np.array([one.logprob for one in found[: len(pairs)]])
    anyway = np.array([one.logprob for one in found[len(pairs) :]])
    chosen = [choice for example in made.examples for choice in example.choices]
    scores = {
        "acc": logprob,
        "acc_norm": logprob / np.array([len(choice) for choice in chosen]),
        "acc_bytes": logprob / np.array([len(choice.encode()) for choice in chosen]),
        "acc_tokens": logprob / np.array([one.tokens for one in found[: len(pairs)]]),
        "acc_unconditional": logprob - anyway,
    }
    right = {name: _best_is_gold(made.examples, score) for name, score in scores.items()}
    headline = right.get(task.headline, right["acc"])
    return {name: proportion(hits) for name, hits in right.items()}, headline


def _partial(
    scorer: Scorer, task: Task, made: Prompts, options: TaskOptions
) -> tuple[dict[str, Estimate], Correct]:
    """The same words behind every context: no length to divide by."""
    pairs = _pairs(scorer, made.examples, options.begin)
    logprob = np.array([one.logprob for one in _likelihoods(scorer, task, pairs)])
    right = _best_is_gold(made.examples, logprob)
    return {"acc": proportion(right)}, right


def _best_is_gold(examples: Sequence[Example], scores: Floats) -> Correct:
    """Whether the option with the highest score is the right one; of equal ones the first."""
    hits, start = [], 0
    for example in examples:
        end = start + len(example.options)
        hits.append(int(np.argmax(scores[start:end])) == example.gold)
        start = end
    return np.array(hits)


def as_record(result: TaskResult) -> dict[str, Any]:
    """A result as JSON tells it."""
    told = asdict(result)
    del told["correct"]
    told["parts"] = {name: {"examples": n, **one} for name, (n, one) in told["parts"].items()}
    return told
