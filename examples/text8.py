"""Characters of Wikipedia: text8 and enwik8, the old benchmarks in bits per character.

    python examples/text8.py                        # a miniature: Shakespeare in text8's alphabet
    python examples/text8.py --file text8.zip       # the text itself, or enwik8: for a GPU, see
                                                    # launch/runs/text8.toml

text8's alphabet is a to z and the space: letters are made small, digits are spelled out, and
everything else becomes one space. 90% are for training, 5% each for validation and test. The last
line is the loss over the test part in bits for each character, with at least half of the context
before it.
"""

import argparse
import re
import runpy
from pathlib import Path

from characters import learn, reading
from training import SCRIPTS, options, run, script

from megagpt.corpus.unfinished import beside
from megagpt.errors import UsageError
from megagpt.files import write_file
from megagpt.use.score import ScoreOptions, evaluate

SPELLED = "zero one two three four five six seven eight nine".split()


def in_its_alphabet(text: str) -> str:
    """As text8 writes a text."""
    spelled = re.sub("[0-9]", lambda digit: f" {SPELLED[int(digit[0])]} ", text.lower())
    return re.sub("[^a-z]+", " ", spelled)


def miniature(args: argparse.Namespace) -> Path:
    """Shakespeare's works in text8's alphabet, as a file."""
    place = args.data.absolute().parent
    place.mkdir(parents=True, exist_ok=True)
    shakespeare = runpy.run_path(str(SCRIPTS / "shakespeare.py"))
    works = shakespeare["texts"](args.archive or shakespeare["download"](place))
    path = beside(args.data, ".txt")
    write_file(path, in_its_alphabet(" ".join(works)))
    return path


def main() -> None:
    """Writes the data, trains, and tells the bits of a character."""
    made = options("Learns the characters of Wikipedia.", "runs/text8", 3000, "micro")
    add = made.add_argument
    add("--file", type=Path, help="text8 or enwik8, plain or zipped; without it the miniature")
    add("--archive", type=Path, help="the miniature's package, where it is there already")
    reading(made, "data/text8-mini", context=128, batch=8)
    args = made.parse_args()
    if args.context % 2:
        raise UsageError(f"--context {args.context}: must be even; half of it precedes what counts")
    file = args.file or miniature(args)
    kind = ["--enwik8"] * ("enwik8" in file.name)
    script("text8.py", "--file", file, "--output", args.data, *kind)
    model, encoding = learn(args, " the ", 300)
    test = beside(args.data, "-test")
    found = evaluate(model, encoding, test, ScoreOptions(stride=args.context // 2))
    print(f"{found.bits_per_byte.value:.4f} bits per character of {test}")


if __name__ == "__main__":
    run(main)
