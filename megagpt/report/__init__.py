"""`megagpt report RUN_DIR ...`: the curves of runs as a picture and as a page (L3)."""

import argparse
from pathlib import Path

NAME = "report.png"
PAGE = "report.html"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.description = (
        "Draws report.png and report.html from the metrics.jsonl of each run folder: "
        "loss over tokens and compute, validation, learning rate, batch size, throughput, gradient "
        "norm, restarts and spikes, and a table of the run with its goodput. With several "
        "folders the runs are compared, and both files go to the first folder unless --output "
        "names another."
    )
    parser.add_argument("folders", metavar="RUN_DIR", nargs="+", type=Path, help="run folder")
    parser.add_argument(
        "--output", metavar="DIR", type=Path, help="folder of the two files (default: first run)"
    )


def run(args: argparse.Namespace) -> None:
    """Writes the files and prints their paths."""
    from megagpt.report.page import write_page
    from megagpt.report.picture import draw_runs
    from megagpt.report.series import read_runs

    runs = read_runs(args.folders)
    folder: Path = args.output or args.folders[0]
    folder.mkdir(parents=True, exist_ok=True)
    print(draw_runs(runs, folder / NAME))
    print(write_page(runs, folder / PAGE))
