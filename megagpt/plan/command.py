"""megagpt plan RUN.toml: what will happen, from the run file alone (L0: no torch)."""

import argparse
import json
import math

from megagpt.config import RunConfig, add_overrides, load_run
from megagpt.errors import UsageError
from megagpt.plan.accelerators import ACCELERATORS, known_gpu
from megagpt.plan.answer import Answer
from megagpt.plan.batch import predict_file
from megagpt.plan.calibrate import calibrate
from megagpt.plan.candidates import Cluster, candidate
from megagpt.plan.ds_config import read_ds_config, resolve
from megagpt.plan.failures import Storm
from megagpt.plan.judge import Judgement, judge, refusal, search, what_works
from megagpt.plan.layout import layout_of
from megagpt.plan.simulate import GPU_HOURS_PER_FAILURE, GPU_HOURS_PER_NOTICE

_SIMULATED = {
    "gpu-hours-per-failure": (GPU_HOURS_PER_FAILURE, "mean GPU-hours between failures"),
    "gpu-hours-per-notice": (GPU_HOURS_PER_NOTICE, "between those that --spot announces"),
    "restart-minutes": (10.0, "from the end of a start to the next one's first step"),
    "queue-minutes": (0.0, "mean time in the queue after a failure"),
    "spot": (None, "dollars for a GPU-hour of machines that leave with notice"),
}
"""Number of --simulate -> what it is where nobody says it, and its meaning."""


def add_options(made: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    made.description = "Checks a run file against a number of GPUs and prints what will happen."
    # --gpu is another option than --gpus.
    made.allow_abbrev = False
    made.add_argument("file", metavar="RUN.toml", nargs="?", help="run file")
    add_overrides(made)
    made.add_argument(
        "--gpus",
        type=int,
        metavar="N",
        help="ranks that will train, one a GPU; without it nothing is judged (pipeline x tensor "
        "ranks, one data rank)",
    )
    made.add_argument("--gpu", default="h100", metavar="NAME", help=f"{', '.join(ACCELERATORS)}")
    made.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="default: 8")
    made.add_argument(
        "--nvlink-domain", type=int, metavar="N",
        help="GPUs that NVLink connects (default: a node; gb200: 72)",
    )  # fmt: skip
    made.add_argument("--network", metavar="400G", help="a node's network, bits a second")
    made.add_argument("--price", type=float, default=0.0, help="dollars for a GPU-hour")
    made.add_argument(
        "--host-memory", type=float, default=0.0, metavar="GB",
        help="memory of a node's host, for what is offloaded (default: as such nodes have)",
    )  # fmt: skip
    made.add_argument("--search", action="store_true", help="the ten fastest layouts that fit")
    made.add_argument("--json", action="store_true", help="all of it as JSON")
    made.add_argument("--write", metavar="DIR", help="write run file, DeepSpeed's JSON, job script")
    made.add_argument("--picture", metavar="FILE.png", help="memory, time and GPUs as a picture")
    _add_simulation(made)
    made.add_argument("--batch", metavar="ROWS.csv", help="predict every row of a table instead")
    made.add_argument("--output", metavar="OUT.csv", help="where --batch writes")
    made.add_argument(
        "--calibrate",
        nargs="+",
        metavar="RUN_DIR",
        help="fit the profile of --gpu to what these runs recorded, for every plan from then on",
    )


def _add_simulation(made: argparse.ArgumentParser) -> None:
    """The options of --simulate."""
    made.add_argument("--simulate", action="store_true", help="the run with its failures")
    for name, (default, text) in _SIMULATED.items():
        text += "" if default is None else f" (default: {default:g})"
        made.add_argument(f"--{name}", type=float, metavar="X", help=text)


def run(args: argparse.Namespace) -> int:
    """Prints the plan. Raises UsageError with every reason why the run cannot go so."""
    if args.batch or args.calibrate:
        return _without_run_file(args)
    if not args.file:
        raise UsageError("megagpt plan needs a run file, or --batch ROWS.csv --output OUT.csv")
    storm = _storm(args)
    config = load_run(args.file, args.overrides)
    cluster = cluster_of(args, config.parallel.pipeline * config.parallel.tensor)
    if config.parallel.dtype == "bf16" and cluster.gpu.startswith("v100"):
        raise UsageError(f"parallel.dtype = 'bf16': {cluster.gpu} has no bf16; set it to fp16")
    found = _searched(args, config, cluster) if args.search else [_judged(args, config, cluster)]
    answer = Answer(file=args.file, found=found, searched=args.search, judged=args.gpus is not None)
    if answer.judged:
        answer = answer.with_more(storm, args.picture, args.write)
    elif storm or args.picture or args.write:
        raise UsageError("--simulate, --picture and --write need --gpus N")
    print(json.dumps(answer.as_json(), indent=1) if args.json else answer.as_text())
    return 0


def _judged(args: argparse.Namespace, config: RunConfig, cluster: Cluster) -> Judgement:
    """The run file's own layout. Raises UsageError where it cannot go or does not fit."""
    tree = read_ds_config(config.parallel.ds_config)
    try:
        resolve(config, layout_of(config, cluster.gpus), tree)
    except UsageError as error:
        if args.gpus is None or args.gpus < 1:
            raise
        raise UsageError(f"{error}\n{what_works(config, cluster)}") from None
    judged = judge(candidate(config, cluster.gpus), cluster)
    if args.gpus is not None and not judged.fits:
        raise UsageError(refusal(judged))
    return judged


def _without_run_file(args: argparse.Namespace) -> int:
    """--batch and --calibrate."""
    if args.batch:
        if not args.output or args.file:
            raise UsageError("--batch ROWS.csv needs --output OUT.csv, and no run file beside it")
        rows, notes = predict_file(args.batch, args.output)
        told = "\n".join([f"{args.output}: {rows} rows", *(f"note: {note}" for note in notes)])
        tree = {"output": args.output, "rows": rows, "notes": notes}
        print(json.dumps(tree) if args.json else told)
        return 0
    if args.file:
        raise UsageError("--calibrate RUN_DIR... takes no run file")
    path = calibrate(args.calibrate, cluster_of(args, 1))
    told = f"{path}: plans for {args.gpu} use these constants from now on"
    print(json.dumps({"profile": str(path), "gpu": args.gpu}) if args.json else told)
    return 0


def cluster_of(args: argparse.Namespace, share: int) -> Cluster:
    """The devices of the command line, `share` of them where it does not say. Raises UsageError
    for what cannot be."""
    args.gpu = known_gpu(args.gpu)
    usual = max(args.gpus_per_node, ACCELERATORS[args.gpu].domain)
    domain = usual if args.nvlink_domain is None else args.nvlink_domain
    for name, value in (("gpus-per-node", args.gpus_per_node), ("nvlink-domain", domain)):
        if value < 1:
            raise UsageError(f"--{name} {value}: must be at least 1")
    network = 0.0
    if args.network is not None:
        try:
            network = float(args.network.upper().removesuffix("G"))
        except ValueError:
            network = 0.0
        if not 0 < network < 1e6:
            raise UsageError(f"--network {args.network}: must be like 400G, 10^9 bits a second")
    for name, what in (("price", "dollars for a GPU-hour"), ("host_memory", "GB of a node")):
        if not 0 <= getattr(args, name) < 1e6:
            option = f"--{name.replace('_', '-')} {getattr(args, name)}"
            raise UsageError(f"{option}: must be {what}, 0 or more")
    return Cluster(
        gpu=args.gpu,
        gpus=share if args.gpus is None else args.gpus,
        per_node=args.gpus_per_node,
        domain=domain,
        node_gb=network,
        price=args.price,
        host_gb=args.host_memory,
    )


def _searched(args: argparse.Namespace, config: RunConfig, cluster: Cluster) -> list[Judgement]:
    """The fastest layouts that fit. Raises UsageError where none does."""
    if args.gpus is None or args.gpus < 1:
        raise UsageError(f"--search needs --gpus N of at least 1, got {args.gpus}")
    found = search(config, cluster)
    if not found:
        raise UsageError(f"{args.file}: {what_works(config, cluster)}")
    return found


def _storm(args: argparse.Namespace) -> Storm | None:
    """What --simulate asks for; None without it. Raises UsageError for numbers that cannot be, and
    for those that would not count."""
    numbers = {name: getattr(args, name.replace("-", "_")) for name in _SIMULATED}
    given = [name for name, value in numbers.items() if value is not None]
    if given and not args.simulate:
        raise UsageError(f"--{given[0]} counts with --simulate alone; add it")
    if not args.simulate:
        return None
    if "gpu-hours-per-notice" in given and args.spot is None:
        raise UsageError("--gpu-hours-per-notice counts with --spot PRICE alone; add it")
    for name, (default, _) in _SIMULATED.items():
        numbers[name] = default if numbers[name] is None else numbers[name]
    failures, notices, restart, queue, spot = numbers.values()
    if min(failures, notices) <= 0 or min(restart, queue, spot or 0.0) < 0:
        raise UsageError(
            "--simulate: --gpu-hours-per-failure and --gpu-hours-per-notice must be above 0; "
            "--restart-minutes, --queue-minutes and --spot 0 or more"
        )
    notices = math.inf if spot is None else notices
    return Storm(
        failures=failures, notices=notices, restart_s=60 * restart, queue_s=60 * queue, spot=spot
    )
