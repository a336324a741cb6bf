"""Tokenize files, folders, standard input or Hugging Face data sets into verified shards.

    python data_prep/tokenize_corpus.py INPUT... --output DIR

INPUT is a file, a folder, a glob, `-` for JSON lines on standard input, or
`hf:NAME[/CONFIG][:SPLIT]` for a data set of Hugging Face. Files are .txt (one document a file),
.jsonl, .json (an array), .parquet, and all but the last also with .gz, .zst, .bz2 or .xz.
The same command continues a killed run.
"""

import sys

from megagpt.corpus.command import file_options, parser, prepare_with, run
from megagpt.corpus.huggingface import as_input


def main() -> int:
    """Parse the command line and prepare."""
    options = parser("Tokenize a corpus into verified shards.")
    options.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="file, folder, glob, - or hf:NAME[/CONFIG][:SPLIT]",
    )
    file_options(options)
    args = options.parse_args()
    print(f"tokenizer: {args.tokenizer} (--tokenizer)", file=sys.stderr)
    return run(
        lambda: prepare_with(args, [as_input(text, args.text_field) for text in args.inputs])
    )


if __name__ == "__main__":
    sys.exit(main())
