"""GPT-3's questions of two-digit addition, learned from the other sums.

    python examples/questions.py
    megagpt evaluate runs/questions --task 2D+

A sum is one record in the form of the paper's test, "Q: What is 48 plus 76?" and "A: 124" behind
it, byte by byte; the answer and the end of its line are scored. The 2,000 questions that `megagpt
evaluate` asks, and 500 more, are not among the 7,500 sums of the training. The last line says how
many of the 2,000 get the right answer.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from training import options, run, run_text, train

from megagpt.corpus.records import Masked, prepare
from megagpt.corpus.unfinished import beside
from megagpt.tasks.arithmetic import LABELS, arithmetic
from megagpt.tasks.scoring import SLACK, TaskOptions, score_task
from megagpt.tokenizer import END_OF_DOCUMENT, load_tokenizer
from megagpt.use.likelihood import Scorer

BATCH = 64
N_CTX = len("\n\nQ: What is 48 plus 76?\n\nA: 124") + SLACK
"""Bytes that a question, its answer and what the test lets follow take."""


def records(sums: dict[str, str]) -> Iterator[Masked]:
    """Questions with their answers, filled up with END-OF-DOCUMENT: ids (N_CTX + 1,)."""
    encoding = load_tokenizer("bytes")
    for question, answer in sums.items():
        ids = np.full(N_CTX + 1, encoding._special_tokens[END_OF_DOCUMENT])
        text = (question + answer + "\n").encode()
        ids[: len(text)] = list(text)
        places = np.arange(N_CTX + 1)
        yield Masked(ids, (places >= len(question)) & (places < len(text)))


def main() -> None:
    """Writes the data, trains, and asks the questions of the test."""
    made = options("Learns to answer sums in words.", "runs/questions", 4000, "nano")
    made.add_argument("--data", type=Path, default=Path("data/questions"), help="its folder")
    args = made.parse_args()
    task = arithmetic(LABELS["2D+"])
    held = {one.contexts[0]: one.choices[0] for one in (*task.pool, *task.examples)}
    every = {
        f"\n\nQ: What is {a} plus {b}?\n\nA:": f" {a + b}" for a in range(100) for b in range(100)
    }
    parts = {"train": {q: a for q, a in every.items() if q not in held}, "test": held}
    for split, place in (("train", args.data), ("test", beside(args.data, "-validation"))):
        prepare(place, records=records(parts[split]), vocabulary="bytes", split=split)
    model = train(args, run_text(args, args.data, N_CTX, 257, BATCH))
    found = score_task(Scorer(model, load_tokenizer("bytes"), 64), task, TaskOptions())
    print(f"test: {found.correct.sum()} of {len(found.correct)}")


if __name__ == "__main__":
    run(main)
