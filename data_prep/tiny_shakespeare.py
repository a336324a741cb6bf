"""Tiny Shakespeare: 1.1 MB of plays, the first text of many small models.

    python data_prep/tiny_shakespeare.py --output data/tiny-shakespeare

The first 90% are for training, the rest is data/tiny-shakespeare-validation, as in char-rnn and
nanoGPT; --file takes a copy that is there already.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

from megagpt.data.download import fetch
from megagpt.data.script import parser, prepare_with, run
from megagpt.data.source import Documents
from megagpt.errors import EXIT_OK

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


def work(args: argparse.Namespace) -> int:
    """Prepare the two splits."""
    path = args.file or fetch(URL, args.output.parent / "tinyshakespeare.txt")
    text = path.read_text("utf-8")
    cut = len(text) * 9 // 10
    for ending, part in (("", text[:cut]), ("-validation", text[cut:])):
        split = argparse.Namespace(**vars(args))
        split.output = args.output.with_name(args.output.name + ending)
        documents = Documents(f"tiny shakespeare{ending}", partial(list, [part]))
        prepare_with(split, [documents])
    return EXIT_OK


def main() -> int:
    """Parse the command line and prepare."""
    options = parser("Tokenize tiny Shakespeare.", "data/tiny-shakespeare")
    options.add_argument("--file", type=Path, help="the text")
    args = options.parse_args()
    args.validation_fraction = 0.0  # the split is by place
    return run(lambda: work(args))


if __name__ == "__main__":
    sys.exit(main())
