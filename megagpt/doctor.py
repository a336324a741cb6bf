"""The doctor as a module, which launchers start: deepspeed --module megagpt.doctor RUN.toml."""

import argparse
import sys

from megagpt.check.command import DESCRIPTION, add_arguments, run
from megagpt.errors import MegagptError


def main() -> int:
    """Runs the command on this rank; returns its exit code."""
    parser = argparse.ArgumentParser(prog="megagpt.doctor", description=DESCRIPTION)
    add_arguments(parser)
    try:
        return run(parser.parse_intermixed_args())
    except MegagptError as error:
        # Only now: a host may lack packages that this needs.
        from megagpt.cluster.process import first_to_fail

        if first_to_fail():
            print(f"megagpt: {error}", file=sys.stderr, flush=True)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
