"""The source code of the running Python's standard library: a real corpus without a download.

    python data_prep/python_stdlib.py --output data/python-stdlib

One document a file, in sorted order, about 12 MB and 6 million GPT-2 tokens. Test suites and
installed packages are left out. 5% of the files are the validation split.
"""

import sys
import sysconfig
from pathlib import Path

from megagpt.corpus.command import parser, prepare_with, run

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def sources() -> list[str]:
    """The paths of the library's modules, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(
        str(path)
        for path in root.rglob("*.py")
        if path.is_file() and not LEFT_OUT & set(path.relative_to(root).parts)
    )


def main() -> int:
    """Parse the command line and prepare."""
    options = parser("Tokenize the sources of Python's standard library.", "data/python-stdlib")
    options.set_defaults(validation_fraction=0.05, format="text")
    args = options.parse_args()
    return run(lambda: prepare_with(args, sources()))


if __name__ == "__main__":
    sys.exit(main())
