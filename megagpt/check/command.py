"""`megagpt doctor [RUN.toml]`: will training work here? A table, with a remedy for each failure.

    megagpt doctor                                          this machine alone
    megagpt doctor RUN.toml --hostfile hosts                every host of a hostfile, by ssh
    deepspeed --hostfile hosts --module megagpt.doctor RUN.toml    the ranks themselves, and the
    srun python -m megagpt.doctor RUN.toml                         network between them

Exit code 0: training can begin; 2: it would fail, or go wrong.
"""

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from megagpt.errors import EXIT_OK, EXIT_USAGE, UsageError

if TYPE_CHECKING:
    from megagpt.check.findings import Order

LAUNCHED = ("RANK", "SLURM_STEP_NUM_TASKS")
"""Variables of which a launcher other than MPI's sets one at least: only then are ranks, and torch,
asked for."""


def add_options(made: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    made.description = (
        "Examines this machine, or every host that it is launched on: deepspeed "
        "--module megagpt.doctor RUN.toml, torchrun -m megagpt.doctor, srun python -m "
        "megagpt.doctor."
    )
    made.add_argument("run_file", nargs="?", metavar="RUN.toml", help="run file to prepare for")
    # Not by add_overrides: megagpt.config needs packages that the doctor may find missing.
    made.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="override of a key"
    )
    made.add_argument(
        "--hostfile", type=Path, metavar="FILE", help="examine its hosts by ssh, before a launch"
    )
    made.add_argument(
        "--nodes", type=int, default=0, metavar="N", help="hosts of a job that is not queued yet"
    )
    made.add_argument("--gpus-per-node", type=int, default=0, metavar="N", help="GPUs of each")
    made.add_argument("--full", action="store_true", help="read every byte of the shards")
    made.add_argument(
        "--wait",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="for the ranks to meet, and for the all-reduce (default: %(default)g)",
    )
    # The deepspeed launcher adds the first; a host that is asked by ssh is given the second.
    made.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    made.add_argument("--order", help=argparse.SUPPRESS)


def _planned(args: argparse.Namespace, order: "Order") -> "Order":
    """The order with the job of --nodes and --gpus-per-node. Raises UsageError for half of one."""
    nodes, gpus = args.nodes, args.gpus_per_node
    if not nodes and not gpus:
        return order
    if nodes < 1 or gpus < 1:
        raise UsageError(
            f"--nodes {nodes} --gpus-per-node {gpus}: give both, each 1 or more; they are the job "
            "that the run file is for"
        )
    return dataclasses.replace(order, ranks=nodes * gpus, gpus_per_node=gpus)


def run(args: argparse.Namespace) -> int:
    """Examines and prints. Raises UsageError for options that do not go together."""
    from megagpt.check.examine import examine
    from megagpt.check.findings import Order, as_text, failed, merged

    if args.order:
        print(json.dumps(dataclasses.asdict(examine(Order(**json.loads(args.order))))))
        return EXIT_OK
    order = _planned(args, Order(run=args.run_file or "", overrides=args.overrides, full=args.full))
    from megagpt.cluster.mpi import marks_of

    if any(name in os.environ for name in LAUNCHED) or marks_of(os.environ):
        from megagpt.check.launched import examine_together
        from megagpt.cluster.ranks import discover

        ranks = discover(os.environ)
        if ranks.world > 1 and args.hostfile:
            raise UsageError(
                f"--hostfile {args.hostfile} with {ranks.world} ranks: give it to the launcher, "
                "deepspeed --hostfile FILE --module megagpt.doctor; or run megagpt doctor alone"
            )
        if ranks.world > 1:
            return examine_together(order, ranks, args.wait)
    if args.hostfile:
        from megagpt.check.ssh import examine_by_ssh

        checks = examine_by_ssh(order, args.hostfile)
    else:
        checks = merged([examine(order)])
    print(as_text(checks))
    return EXIT_USAGE if failed(checks) else EXIT_OK
