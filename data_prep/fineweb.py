"""FineWeb (web pages, filtered and deduplicated) from Hugging Face: a sample of 10 billion tokens.

    python data_prep/fineweb.py --config sample-10BT --output data/fineweb

sample-100BT, sample-350BT or a crawl such as CC-MAIN-2024-10 are larger; --edu takes FineWeb-Edu.
"""

import sys

from megagpt.corpus.command import parser, prepare_with, run
from megagpt.corpus.huggingface import hub_documents


def main() -> int:
    """Parse the command line and prepare."""
    options = parser("Tokenize FineWeb.", "data/fineweb")
    options.add_argument("--config", default="sample-10BT", help="sample or crawl")
    options.add_argument("--edu", action="store_true", help="FineWeb-Edu instead of FineWeb")
    options.add_argument("--source", metavar="hf:NAME", help="another data set or a local copy")
    options.set_defaults(validation_fraction=0.0005)
    args = options.parse_args()
    name = "fineweb-edu" if args.edu else "fineweb"
    address = args.source or f"hf:HuggingFaceFW/{name}/{args.config}"
    return run(lambda: prepare_with(args, [hub_documents(address, "text")]))


if __name__ == "__main__":
    sys.exit(main())
