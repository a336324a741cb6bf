"""Sorting six digits, learned from examples: minGPT's demo.

    python examples/sort.py

One record is six digits of 0, 1 and 2 and the same six in order; only those in order are scored.
Of the 729 inputs a quarter, chosen by a hash, is the test. The last line says how many of its
inputs the model sorts without a mistake.
"""

import hashlib
from itertools import product
from pathlib import Path

import torch
from training import answers, options, run, run_text, train

from megagpt.corpus.records import Masked, prepare
from megagpt.corpus.unfinished import beside

LENGTH, DIGITS, BATCH = 6, 3, 64


def splits() -> dict[str, list[tuple[int, ...]]]:
    """The inputs of the training and of the test."""
    parts: dict[str, list[tuple[int, ...]]] = {"train": [], "test": []}
    for digits in product(range(DIGITS), repeat=LENGTH):
        held_out = hashlib.sha256(bytes(digits)).digest()[0] % 4 == 0
        parts["test" if held_out else "train"].append(digits)
    return parts


def main() -> None:
    """Writes the data, trains, and tells how many inputs come out in order."""
    made = options("Learns to sort.", "runs/sort", 1500, "nano")
    made.add_argument("--data", type=Path, default=Path("data/sort"), help="folder of the shards")
    args = made.parse_args()
    parts = splits()
    scored = [0] * LENGTH + [1] * LENGTH
    held = beside(args.data, "-validation")
    for split, folder in (("train", args.data), ("test", held)):
        rows = [Masked([*digits, *sorted(digits)], scored) for digits in parts[split]]
        prepare(folder, records=rows, vocabulary=DIGITS, split=split)
    model = train(args, run_text(args, args.data, 2 * LENGTH - 1, DIGITS, BATCH))
    for split in ("train", "test"):
        questions = torch.tensor(parts[split])
        found = answers(model, questions, LENGTH)
        right = int((found == questions.sort(1).values).all(1).sum())
        print(f"{split}: {right} of {len(questions)}")


if __name__ == "__main__":
    run(main)
