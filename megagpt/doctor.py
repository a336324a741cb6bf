"""The doctor as a module, which launchers start: deepspeed --module megagpt.doctor RUN.toml."""

import sys

from megagpt.cli import run
from megagpt.errors import ended


def main() -> int:
    """Runs the command on this rank; returns its exit code."""
    return ended(lambda: run(["doctor", *sys.argv[1:]]), _speaks)


def _speaks() -> bool:
    # Only now: a host may lack packages that this needs.
    from megagpt.cluster.process import first_to_fail

    return first_to_fail()


if __name__ == "__main__":
    sys.exit(main())
