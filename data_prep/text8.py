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
import zlib
from pathlib import Path

from megagpt.corpus.command import parser, prepare_by_place, run
from megagpt.corpus.download import fetch
from megagpt.errors import DamageError

URL = "http://mattmahoney.net/dc/text8.zip"
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, KeyError, UnicodeDecodeError, RuntimeError)
"""What an archive raises that is not text8's: RuntimeError of a password or a foreign method."""


def read(path: Path) -> str:
    """The text of text8, plain or zipped. Raises DamageError."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return archive.read("text8").decode("ascii")
        return path.read_text("ascii")
    except DAMAGE as error:
        raise DamageError(f"{path}: not text8 ({error}); remove it to download again") from None


def work(args: argparse.Namespace) -> int:
    """Prepare the three splits."""
    path = args.file or fetch(URL, args.output.parent / "text8.zip")
    return prepare_by_place(args, read(path), {"train": 90, "validation": 5, "test": 5})


def main() -> int:
    """Parse the command line and prepare."""
    options = parser("Tokenize text8.", "data/text8")
    options.add_argument("--file", type=Path, help="text8 or text8.zip")
    options.set_defaults(tokenizer="bytes")
    args = options.parse_args()
    return run(lambda: work(args))


if __name__ == "__main__":
    sys.exit(main())
