"""Tiny Shakespeare: 1.1 MB of plays, the first text of many small models.

    python data_prep/tiny_shakespeare.py --output data/tiny-shakespeare

The first 90% are for training, the rest is data/tiny-shakespeare-validation, as in char-rnn and
nanoGPT; --file takes a copy that is there already.
"""

import argparse
import sys
from pathlib import Path

from megagpt.corpus.command import parser, prepare_by_place, run
from megagpt.corpus.download import fetch
from megagpt.errors import DamageError

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


def work(args: argparse.Namespace) -> int:
    """Prepare the two splits."""
    path = args.file or fetch(URL, args.output.parent / "tinyshakespeare.txt")
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise DamageError(f"{path}: not the plays ({error}); remove it to download again") from None
    return prepare_by_place(args, text, {"train": 90, "validation": 10})


def main() -> int:
    """Parse the command line and prepare."""
    options = parser("Tokenize tiny Shakespeare.", "data/tiny-shakespeare")
    options.add_argument("--file", type=Path, help="the text")
    args = options.parse_args()
    return run(lambda: work(args))


if __name__ == "__main__":
    sys.exit(main())
