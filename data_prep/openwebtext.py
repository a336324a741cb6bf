"""OpenWebText (8 million pages, 38 GB of text, 9 billion tokens) from Hugging Face.

python data_prep/openwebtext.py --output data/openwebtext
"""

import sys

from megagpt.corpus.command import parser, prepare_with, run
from megagpt.corpus.huggingface import hub_documents


def main() -> int:
    """Parse the command line and prepare."""
    options = parser("Tokenize OpenWebText.", "data/openwebtext")
    options.add_argument("--source", default="hf:Skylion007/openwebtext", metavar="hf:NAME",
                         help="data set, or a local copy")  # fmt: skip
    options.set_defaults(validation_fraction=0.0005)
    args = options.parse_args()
    return run(lambda: prepare_with(args, [hub_documents(args.source, "text")]))


if __name__ == "__main__":
    sys.exit(main())
