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
import subprocess
import sys
from pathlib import Path

from training import options, run_text, train

from megagpt.checkpoint import load_model
from megagpt.files import write_file
from megagpt.use.generate import TextOptions, generate
from megagpt.use.score import ScoreOptions, evaluate

SCRIPTS = Path(__file__).resolve().parents[1] / "data_prep"
SPELLED = "zero one two three four five six seven eight nine".split()
VOCABULARY = 257
"""The bytes and END-OF-DOCUMENT."""


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
    path = place / f"{args.data.name}.txt"
    write_file(path, in_its_alphabet(" ".join(works)))
    return path


def main() -> None:
    """Writes the data, trains, and tells the bits of a character."""
    made = options("Learns the characters of Wikipedia.", "runs/text8", 2400, "micro")
    add = made.add_argument
    add("--file", type=Path, help="text8 or enwik8, plain or zipped; without it the miniature")
    add("--archive", type=Path, help="the miniature's package, where it is there already")
    add("--data", type=Path, default=Path("data/text8-mini"), help="folder of the shards")
    add("--context", type=int, default=128, help="characters that the model sees; even")
    add("--batch", type=int, default=16, help="sequences of a step")
    args = made.parse_args()
    file = args.file or miniature(args)
    words = [str(SCRIPTS / "text8.py"), "--file", str(file), "--output", str(args.data)]
    words += ["--enwik8"] * ("enwik8" in file.name)
    if code := subprocess.run([sys.executable, *words]).returncode:
        sys.exit(code)
    train(args, run_text(args, args.data, args.context, VOCABULARY, args.batch))
    model, encoding, _ = load_model(args.output)
    drawn = TextOptions(max_tokens=300, temperature=0.8, seed=args.seed, start=False)
    print("".join(generate(model, encoding, " the ", drawn)))
    test = args.data.with_name(f"{args.data.name}-test")
    found = evaluate(model, encoding, test, ScoreOptions(stride=args.context // 2))
    print(f"{found.bits_per_byte.value:.4f} bits per character of {test}")


if __name__ == "__main__":
    main()
