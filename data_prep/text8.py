"""text8: the first 10^8 characters of cleaned English Wikipedia, the old character-level task.

    python data_prep/text8.py --output data/text8

The usual split is by place: 90 MB for training, 5 MB each for validation and test. They become
data/text8, data/text8-validation and data/text8-test, each one document; --file takes a copy of
text8 or text8.zip that is there already. Byte tokens, so that the loss in bits is bits per
character.
"""

import argparse
import sys
import zipfile
from functools import partial
from pathlib import Path

from megagpt.data.download import fetch
from megagpt.data.script import parser, prepare_with, run
from megagpt.data.source import Documents
from megagpt.errors import EXIT_OK, DamageError

URL = "http://mattmahoney.net/dc/text8.zip"


def read(path: Path) -> str:
    """The text of text8, plain or zipped. Raises DamageError."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return archive.read("text8").decode("ascii")
        return path.read_text("ascii")
    except (zipfile.BadZipFile, KeyError, UnicodeDecodeError) as error:
        raise DamageError(f"{path}: not text8 ({error}); remove it to download again") from None


def work(args: argparse.Namespace) -> int:
    """Prepare the three splits."""
    path = args.file or fetch(URL, args.output.parent / "text8.zip")
    text = read(path)
    cuts = [0, len(text) * 90 // 100, len(text) * 95 // 100, len(text)]
    for ending, start, end in zip(("", "-validation", "-test"), cuts, cuts[1:], strict=False):
        part = text[start:end]
        split = argparse.Namespace(**vars(args))
        split.output = args.output.with_name(args.output.name + ending)
        documents = Documents(f"text8[{start}:{end}]", partial(list, [part]))
        prepare_with(split, [documents])
    return EXIT_OK


def main() -> int:
    """Parse the command line and prepare."""
    options = parser("Tokenize text8.", "data/text8")
    options.add_argument("--file", type=Path, help="text8 or text8.zip")
    options.set_defaults(tokenizer="bytes")
    args = options.parse_args()
    args.validation_fraction = 0.0  # the split is by place
    return run(lambda: work(args))


if __name__ == "__main__":
    sys.exit(main())
