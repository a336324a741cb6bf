"""text8 and enwik8: the first 10^8 characters of cleaned English Wikipedia, or bytes of its XML.

    python data_prep/text8.py --output data/text8
    python data_prep/text8.py --enwik8 --output data/enwik8

The usual split is by place: 90 MB for training, 5 MB each for validation and test. They become
data/text8, data/text8-validation and data/text8-test, each one document; --file takes a copy of
text8 or text8.zip (enwik8, enwik8.zip) that is there already. Byte tokens, so that the loss in bits
is bits per character, and bits per byte of enwik8, of which a cut may go through a character.
"""

import argparse
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np

from megagpt.corpus.command import parser, prepare_by_place, run, split_by_place
from megagpt.corpus.download import fetch
from megagpt.corpus.records import prepare
from megagpt.errors import DamageError, UsageError

URL = "http://mattmahoney.net/dc/{}.zip"
PERCENT = {"train": 90, "validation": 5, "test": 5}
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, KeyError, UnicodeDecodeError, RuntimeError)
"""What an archive raises that is not text8's: RuntimeError of a password or a foreign method."""


def read(path: Path, name: str) -> bytes:
    """The bytes of text8 or enwik8, plain or zipped. Raises DamageError for another content,
    UsageError for what cannot be read."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                content = archive.read(name)
        else:
            content = path.read_bytes()
        if name == "text8":
            content.decode("ascii")
        return content
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be read ({error.strerror}); give {name} or {name}.zip, or leave "
            "out --file to download it"
        ) from None
    except DAMAGE as error:
        raise DamageError(f"{path}: not {name} ({error}); remove it to download again") from None


def prepare_bytes(output: Path, content: bytes) -> int:
    """Prepare the three splits of bytes that need be no text."""
    ids = np.frombuffer(content, np.uint8)
    for split, folder, start, end in split_by_place(output, len(ids), PERCENT):
        prepare(folder, documents=[ids[start:end]], vocabulary="bytes", split=split)
        print(f"{folder}: {split} split, bytes {start} to {end} of {len(ids)}")
    return 0


def work(args: argparse.Namespace) -> int:
    """Prepare the three splits."""
    name = "enwik8" if args.enwik8 else "text8"
    path = args.file or fetch(URL.format(name), args.output.parent / f"{name}.zip")
    content = read(path, name)
    if args.enwik8:
        return prepare_bytes(args.output, content)
    return prepare_by_place(args, content.decode("ascii"), PERCENT)


def main() -> int:
    """Parse the command line and prepare."""
    options = parser("Tokenize text8 or enwik8.", "data/text8")
    options.add_argument("--file", type=Path, help="text8 or text8.zip; enwik8 or enwik8.zip")
    options.add_argument("--enwik8", action="store_true", help="enwik8, which may be any bytes")
    options.set_defaults(tokenizer="bytes")
    args = options.parse_args()
    return run(lambda: work(args))


if __name__ == "__main__":
    sys.exit(main())
