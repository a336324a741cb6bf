"""The doctor as a module, which launchers start: deepspeed --module megagpt.doctor RUN.toml."""

import argparse
import sys

from megagpt.check.command import DESCRIPTION, add_arguments, run
from megagpt.errors import ended


def main() -> int:
    """Runs the command on this rank; returns its exit code."""
    parser = argparse.ArgumentParser(prog="megagpt.doctor", description=DESCRIPTION)
    add_arguments(parser)
    return ended(lambda: run(parser.parse_intermixed_args()), _speaks)


def _speaks() -> bool:
    # Only now: a host may lack packages that this needs.
    from megagpt.cluster.process import first_to_fail

    return first_to_fail()


if __name__ == "__main__":
    sys.exit(main())
