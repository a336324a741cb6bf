"""Adding two numbers, learned from sums alone: minGPT's adder.

    python examples/adder.py                  # two digits
    python examples/adder.py --digits 3
    python examples/adder.py --forward        # the sum in the order in which people write it

A sum is one record: 85 + 50 = 135 is 8 5 5 0 5 3 1. The sum stands reversed, so that each of its
digits needs only the carry of the one before it. Its digits alone are scored. The last line says
how many of the test's sums the model gets right, digit for digit; none of them was trained on.
"""

import argparse
from pathlib import Path

import torch
from training import answers, options, run, run_text, train

from megagpt.corpus.records import Masked, prepare
from megagpt.corpus.unfinished import beside

BATCH = 256


def problems(digits: int, forward: bool) -> torch.Tensor:
    """All sums of two numbers of so many digits: ids (10^(2 digits), 3 digits + 1)."""
    count = 10**digits
    a, b = torch.meshgrid(torch.arange(count), torch.arange(count), indexing="ij")
    a, b = a.reshape(-1), b.reshape(-1)
    powers = 10 ** torch.arange(digits)

    def written(numbers: torch.Tensor, powers: torch.Tensor) -> torch.Tensor:
        return numbers[:, None] // powers % 10

    total = written(a + b, 10 ** torch.arange(digits + 1))  # the last digit first
    total = total.flip(1) if forward else total
    return torch.cat([written(a, powers.flip(0)), written(b, powers.flip(0)), total], 1)


def splits(digits: int, forward: bool) -> dict[str, torch.Tensor]:
    """The sums of the training and of the test: a fifth of all, 500 at most, as in minGPT."""
    every = problems(digits, forward)
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(1337))
    size = min(len(every) // 5, 500)
    return {"test": every[order[:size]], "train": every[order[size:]]}


def write(data: Path, parts: dict[str, torch.Tensor], digits: int) -> None:
    """The sums as two corpora of records; only the digits of the sum are scored."""
    scored = torch.arange(3 * digits + 1) >= 2 * digits
    for split, folder in (("train", data), ("test", beside(data, "-validation"))):
        samples = (Masked(row, scored) for row in parts[split].numpy())
        prepare(folder, records=samples, vocabulary=10, split=split)


def main() -> None:
    """Writes the data, trains, and tells how many sums are right."""
    made = options("Learns to add.", "runs/adder", 3000, "nano")
    made.add_argument("--digits", type=int, choices=(1, 2, 3), default=2, help="of each number")
    made.add_argument("--forward", action="store_true", help="do not reverse the sum")
    made.add_argument("--data", type=Path, default=Path("data/adder"), help="its name's beginning")
    args: argparse.Namespace = made.parse_args()
    kind = f"{args.digits}{'-forward' * args.forward}"
    data = beside(args.data, f"-{kind}")
    args.output = beside(args.output, f"-{kind}")
    parts = splits(args.digits, args.forward)
    write(data, parts, args.digits)
    model = train(args, run_text(args, data, 3 * args.digits, 10, BATCH))
    questions = 2 * args.digits
    for split in ("train", "test"):
        rows = parts[split][:5000]
        found = answers(model, rows[:, :questions], args.digits + 1)
        right = int((found == rows[:, questions:]).all(1).sum())
        print(f"{split}: {right} of {len(rows)}")


if __name__ == "__main__":
    run(main)
