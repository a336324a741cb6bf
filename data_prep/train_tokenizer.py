"""Train a byte-level BPE of any size on your own text and store it as tokenizer.json.

    python data_prep/train_tokenizer.py INPUT... --vocab-size 16384 --output data/tokenizer.json
    python data_prep/tokenize_corpus.py INPUT... --tokenizer data/tokenizer.json --output data/web

INPUT is what tokenize_corpus.py takes. The file opens in Hugging Face tokenizers; megagpt encodes
with tiktoken from the same file, and this script checks on the training text that the two agree.
"""

import argparse
import sys
from pathlib import Path

from megagpt.corpus.command import file_options, run
from megagpt.errors import EXIT_OK


def work(args: argparse.Namespace) -> int:
    """Train, store, check."""
    from megagpt.corpus.train_bpe import train_tokenizer

    print(train_tokenizer(args.inputs, args))
    return EXIT_OK


def main() -> int:
    """Parse the command line and train."""
    options = argparse.ArgumentParser(
        description="Train a byte-level BPE.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    options.add_argument("inputs", nargs="+", metavar="INPUT", help="files, folders, globs, -")
    options.add_argument("--output", type=Path, required=True, metavar="FILE",
                         help="the tokenizer.json to write")  # fmt: skip
    options.add_argument("--vocab-size", type=int, default=50257, metavar="N",
                         help="tokens, the 256 bytes and END-OF-DOCUMENT included")  # fmt: skip
    options.add_argument("--sample-bytes", type=int, default=1_000_000_000, metavar="N",
                         help="UTF-8 bytes of text to train on, from the start")  # fmt: skip
    file_options(options)
    args = options.parse_args()
    return run(lambda: work(args))


if __name__ == "__main__":
    sys.exit(main())
