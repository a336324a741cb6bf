"""Wikipedia in one language (English: 6.4 million articles, 20 GB of text) from Hugging Face.

python data_prep/wikipedia.py --language en --output data/wikipedia
"""

import sys

from megagpt.corpus.command import parser, prepare_with, run
from megagpt.corpus.huggingface import hub_documents


def main() -> int:
    """Parse the command line and prepare."""
    options = parser("Tokenize Wikipedia.", "data/wikipedia")
    options.add_argument("--language", default="en", help="code of the language")
    options.add_argument("--date", default="20231101", help="date of the dump, YYYYMMDD")
    options.add_argument("--source", default="hf:wikimedia/wikipedia/{date}.{language}",
                         metavar="hf:NAME", help="data set, or a local copy")  # fmt: skip
    options.set_defaults(validation_fraction=0.001)
    args = options.parse_args()
    address = args.source.replace("{date}", args.date).replace("{language}", args.language)
    return run(lambda: prepare_with(args, [hub_documents(address, "text")]))


if __name__ == "__main__":
    sys.exit(main())
