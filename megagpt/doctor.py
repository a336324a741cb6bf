"""The doctor as a module, which launchers start: deepspeed --module megagpt.doctor RUN.toml."""

import argparse
import sys

from megagpt.check.doctor import DESCRIPTION, add_arguments, run
from megagpt.cluster.meeting import first_to_fail
from megagpt.errors import MegagptError


def main() -> int:
    """Runs the command on this rank; returns its exit code."""
    parser = argparse.ArgumentParser(prog="megagpt.doctor", description=DESCRIPTION)
    add_arguments(parser)
    try:
        return run(parser.parse_intermixed_args())
    except MegagptError as error:
        if first_to_fail():
            print(f"megagpt: {error}", file=sys.stderr, flush=True)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
