"""`megagpt launch SYSTEM RUN.toml`: a job made for one run, checked before it is queued.

    megagpt launch slurm RUN.toml --nodes 2 --gpus-per-node 8 --time 24:00:00 --submit
    megagpt launch pbs | lsf | kubernetes RUN.toml --nodes 2 --gpus-per-node 8 --time 24:00:00

The script lies in the run folder: RUN_DIR/job.sbatch, with its log beside it in RUN_DIR/job.log.
A sweep is an array whose tasks train in folders of their own below RUN_DIR.
"""

import argparse
import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
from pathlib import Path
from typing import Any

from megagpt.config import RunConfig, add_overrides, load_run
from megagpt.errors import EXIT_OK, UsageError
from megagpt.files import write_durably
from megagpt.plan.corpora import mismatches, missing
from megagpt.plan.ds_config import read_ds_config, resolve
from megagpt.plan.layout import Layout, layout_of, spans_hosts
from megagpt.submit.job import lead_s, pattern, script, seconds_of, sweep_of
from megagpt.submit.pods import KINDS, Pods, manifest
from megagpt.submit.systems import Facts, lsf, pbs

RECENT = 100
"""Steps that tell a run's speed."""
OTHERS = {
    "pbs": ("RUN_DIR/job.pbs, a job of PBS", "qsub JOB"),
    "lsf": ("RUN_DIR/job.lsf, a job of LSF", "bsub < JOB"),
    "kubernetes": ("RUN_DIR/job.json, a job of Kubeflow", "kubectl apply -f JOB"),
}
"""System -> what is written, how it is submitted."""
FURTHER = ("gres", "constraint", "exclude", "reservation", "mem", "container")
"""Options of sbatch that a job takes as they are."""
OWN = "nodes ntasks ntasks-per-node time array wrap"
"""Options that no --sbatch may change: the run was checked for them, and has one folder."""
RECENT_SAVES = 5
"""Saves that tell how long the next one takes."""


def add_options(made: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    made.description = "Writes job scripts. Without a batch system see launch/multinode.sh."
    systems = made.add_subparsers(metavar="SYSTEM", required=True)
    slurm = systems.add_parser(
        "slurm",
        help="a job of SLURM, one task for each GPU",
        description="Checks a run file against nodes x GPUs and writes RUN_DIR/job.sbatch. The job "
        "saves before its end and when it is preempted, and is queued again until the run is done.",
    )
    add_facts(slurm)
    add_slurm(slurm)
    slurm.set_defaults(run=run)
    for name, (text, submitted) in OTHERS.items():
        other = systems.add_parser(name, help=text, description=f"Checks a run file against nodes "
            f"x GPUs and writes {text}. Submit it with {submitted}.")  # fmt: skip
        add_facts(other, name != "kubernetes")
        other.set_defaults(run=run_other, system=name)
        if name == "kubernetes":
            other.add_argument("--kind", choices=KINDS, default=KINDS[0],
                help="of the Training Operator (the default), or of the Trainer")  # fmt: skip
            other.add_argument("--image", required=True, help="with Python and the packages")
            other.add_argument("--claim", required=True, help="volume claim that all pods share")
            other.add_argument("--mount", required=True, metavar="DIR",
                help="where the volume is, with the checkout and the run's folders")  # fmt: skip
        else:
            other.add_argument("--option", action="append", default=[], metavar="LINE",
                help="a further line of options, as the system reads it")  # fmt: skip


def add_facts(parser: argparse.ArgumentParser, queues: bool = True) -> None:
    """The options of a job on any system. queues: it has queues and accounts."""
    parser.add_argument("file", metavar="RUN.toml", help="run file")
    add_overrides(parser)
    parser.add_argument("--nodes", type=int, required=True, metavar="N", help="hosts of the job")
    parser.add_argument(
        "--gpus-per-node", type=int, required=True, metavar="N", help="GPUs of each, a rank for one"
    )
    parser.add_argument(
        "--time",
        required=True,
        metavar="T",
        help="limit of each start, as SLURM reads it: minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S",
    )
    parser.add_argument("--cpus-per-task", type=int, default=8, metavar="N", help="cores of a rank")
    for name in ("partition", "account") if queues else ():
        also = ["--queue"] * (name == "partition")
        parser.add_argument(
            f"--{name}", *also, default="", metavar="NAME", help=f"{name} of the batch system"
        )
    parser.add_argument("--name", default="", help="of the job (default: the run folder's)")


def add_slurm(slurm: argparse.ArgumentParser) -> None:
    """The options of a job of SLURM alone."""
    for name in ("qos", *FURTHER):
        slurm.add_argument(f"--{name}", default="", metavar=name.upper(), help=f"sbatch's --{name}")
    slurm.add_argument("--exclusive", action="store_true", help="whole nodes")
    slurm.add_argument("--spare", type=int, default=0, metavar="K", help="hosts in reserve")
    slurm.add_argument(
        "--no-gres", action="store_true", help="ask for no GPUs, where nodes have none to give out"
    )
    slurm.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION[=VALUE]",
        help="any other long option of sbatch, such as --sbatch comment=mine; several options",
    )
    slurm.add_argument(
        "--chain",
        type=int,
        nargs="?",
        const=0,
        metavar="N",
        help="N jobs one after another instead of one that is queued again; without N as many as "
        "the run needs at its measured speed",
    )
    slurm.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="section.key=V1,V2,...",
        help="an array with a run for each value; several options: for each combination",
    )
    slurm.add_argument("--submit", action="store_true", help="submit it, too")


def run_other(args: argparse.Namespace) -> int:
    """Writes the job of another system. Raises UsageError for a run that cannot go so."""
    check_options(args)
    config, layout = checked(args, [], submit=False)
    folder = Path(config.output).resolve()
    facts = Facts(
        name=args.name or folder.name,
        nodes=args.nodes,
        gpus=args.gpus_per_node,
        cores=args.cpus_per_task,
        seconds=seconds_of(args.time),
        lead=lead_of(args, config, records_of(config)),
        folder=folder,
        arguments=[args.file, *args.overrides],
        own_minutes=config.checkpoint.stop_after_minutes,
        queue=getattr(args, "partition", ""),
        account=getattr(args, "account", ""),
        options=getattr(args, "option", []),
    )
    if args.system == "kubernetes":
        pods = Pods(args.image, args.claim, args.mount)
        name, text = "job.json", manifest(args.kind, facts, pods)
    else:
        name, text = f"job.{args.system}", {"pbs": pbs, "lsf": lsf}[args.system](facts)
    write_job(args, folder / name, text, layout)
    job = shlex.quote(str(folder / name))
    print(f"submit it: {OTHERS[args.system][1]}".replace("JOB", job))
    return EXIT_OK


def run(args: argparse.Namespace) -> int:
    """Writes the script. Raises UsageError for a run that cannot go so, and what SLURM refuses."""
    check_options(args)
    config = load_run(args.file, args.overrides)
    sweep = sweep_of(args.sweep, config.output) if args.sweep else []
    for overrides in sweep or [[]]:
        _, layout = checked(args, overrides, args.submit)
    records = records_of(config)
    lead, steps = lead_of(args, config, records), recent(records, "loss", RECENT)
    starts = starts_needed(config, steps, seconds_of(args.time) - lead)
    count = 1 if args.chain is None else args.chain or starts
    if count < 1:
        why = "is complete" if steps else "has no measured speed yet; say --chain N"
        raise UsageError(f"--chain: the run in {config.output} {why}")
    log = f"{pattern(config.output)}/{'job-%a.log' if sweep else 'job.log'}"
    path = Path(config.output) / "job.sbatch"
    options = sbatch_options(args, Path(config.output).resolve().name, lead, log, len(sweep))
    text = script(options, [args.file, *args.overrides], sweep, args.spare)
    write_job(args, path, text, layout)
    if slow := spans_hosts(layout, args.gpus_per_node):
        print(f"slow: {slow}")
    print(f"told to save and stop {lead} s before its end; log: {log}")
    if starts and not sweep:
        print(f"at the speed of the run's latest steps: {starts} starts of that time")
    for index, overrides in enumerate(sweep):
        print(f"task {index}: {' '.join(overrides)}")
    if args.submit:
        print("submitted: " + " ".join(submit(path, count)))
    else:
        ask(path)
        how = f"which queues {count} jobs" if count > 1 else f"or sbatch {shlex.quote(str(path))}"
        print(f"not submitted: say --submit, {how}")
    return EXIT_OK


def checked(
    args: argparse.Namespace, overrides: list[str], submit: bool
) -> tuple[RunConfig, Layout]:
    """The run, with overrides of a task's own, and its layout. Raises UsageError with every reason
    why it cannot go on the job's GPUs."""
    config = load_run(args.file, [*args.overrides, *overrides])
    layout = layout_of(config, args.nodes * args.gpus_per_node)
    resolve(config, layout, read_ds_config(config.parallel.ds_config))
    check_corpora(config, submit)
    return config, layout


def lead_of(args: argparse.Namespace, config: RunConfig, records: list[dict[str, Any]]) -> int:
    """Seconds before its end at which the job is told to stop, by what the run has measured."""
    step_s = max((step["step_s"] for step in recent(records, "loss", RECENT)), default=0.0)
    save_s = max((save["save_s"] for save in recent(records, "save_s", RECENT_SAVES)), default=0.0)
    return lead_s(config, args.nodes, args.time, step_s, save_s)


def write_job(args: argparse.Namespace, path: Path, text: str, layout: Layout) -> None:
    """Writes a job, in a folder that is there then: SLURM drops the log of one whose is not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, text.encode("utf-8", errors="surrogateescape"))
    print(f"{path}: {layout}, {args.nodes} x {args.gpus_per_node} GPUs, {args.time}")


def check_corpora(config: RunConfig, submit: bool) -> None:
    """Says which corpora of a run are not here, and what does not fit.

    Raises UsageError where the job would be submitted all the same.
    """
    if absent := missing(config):
        text = (
            f"{', '.join(absent)}: no prepared corpus there, and the job will end at once without "
            "it; prepare it, set STAGE to what is copied there, or correct the paths in [data]"
        )
        if submit and not os.environ.get("STAGE"):
            raise UsageError(text)
        print(f"note: {text}")
    for mismatch in mismatches(config):
        print(f"note: {mismatch}")


def check_options(args: argparse.Namespace) -> None:
    """Raises UsageError for what no job can be."""
    for name, least in {"nodes": 1, "gpus_per_node": 1, "cpus_per_task": 1, "spare": 0}.items():
        if getattr(args, name, least) < least:
            option = name.replace("_", "-")
            raise UsageError(f"--{option} {getattr(args, name)}: must be {least} or more")
    if getattr(args, "chain", None) is not None and args.sweep:
        raise UsageError(
            "--chain with --sweep: the tasks of a sweep are queued again by themselves; leave one "
            "of the two out"
        )


def sbatch_options(
    args: argparse.Namespace, name: str, lead: int, log: str, tasks: int
) -> dict[str, str]:
    """The job's options. lead: seconds before its end at which SLURM tells it to stop.

    tasks: of an array, 0: no array.
    """
    options = {
        "job-name": args.name or name,
        "nodes": str(args.nodes + args.spare),
        "ntasks-per-node": str(args.gpus_per_node),
        "gpus-per-node": str(args.gpus_per_node),
        "cpus-per-task": str(args.cpus_per_task),
        "time": args.time,
        "signal": f"B:USR1@{lead}",
        # The jobs of a chain follow one another instead.
        "requeue" if args.chain is None else "no-requeue": "",
        "open-mode": "append",
        "output": log,
    }
    if args.gres or args.no_gres:
        del options["gpus-per-node"]
    # With spare hosts, one that is lost ends its step alone.
    flags = {"exclusive": args.exclusive, "no-kill": args.spare}
    options |= {name: "" for name, asked in flags.items() if asked}
    more = {key: getattr(args, key) for key in ("partition", "account", "qos", *FURTHER)}
    more["array"] = f"0-{tasks - 1}" if tasks else ""
    options |= {key: value for key, value in more.items() if value}
    for option in args.sbatch:
        key, _, value = option.removeprefix("--").partition("=")
        if not re.fullmatch(r"[a-z][a-z0-9-]*", key) or key in OWN.split():
            raise UsageError(f"--sbatch {option}: must be a long option of sbatch other than {OWN}")
        options[key] = value
    return options


def records_of(config: RunConfig) -> list[dict[str, Any]]:
    """What a run has recorded; nothing before its first step."""
    from megagpt.log import read_metrics

    folder = Path(config.output)
    return read_metrics(folder) if (folder / "metrics.jsonl").exists() else []


def recent(records: list[dict[str, Any]], key: str, count: int) -> list[dict[str, Any]]:
    """The latest records that have the key."""
    return [record for record in records if key in record][-count:]


def starts_needed(config: RunConfig, steps: list[dict[str, Any]], seconds: float) -> int:
    """Jobs of so many seconds of training that the rest of a run takes at the speed of its latest
    steps; 0 where there are none.
    """
    if not steps:
        return 0
    speed = statistics.median(step["tokens_per_s"] for step in steps)
    return math.ceil((config.schedule.end_tokens - steps[-1]["tokens"]) / speed / seconds)


# --- SLURM --------------------------------------------------------------------------------------


def submit(path: Path, count: int) -> list[str]:
    """Submits a script so many times, each to start when all before it ended before the run did.

    Returns the ids of the jobs. Raises UsageError with what SLURM says against it.
    """
    jobs: list[str] = []
    for _ in range(count):
        options = ["--parsable"]
        if jobs:
            # The job that finishes the run is the first to end well; the rest is then cancelled.
            ended = ":".join(jobs)
            options += [f"--dependency=afternotok:{ended}", "--kill-on-invalid-dep=yes"]
        jobs.append(_sbatch(*options, str(path)).split(";")[0])
    return jobs


def ask(path: Path) -> None:
    """Lets SLURM say when it would start a script, where a SLURM answers. Raises UsageError."""
    if not shutil.which("scontrol"):
        return
    if subprocess.run(["scontrol", "ping"], capture_output=True).returncode == 0:
        print(_sbatch("--test-only", str(path)))


def _sbatch(*arguments: str) -> str:
    try:
        done = subprocess.run(["sbatch", *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        raise UsageError(
            "sbatch is not there: --submit needs a host where SLURM's commands are installed"
        ) from None
    if done.returncode:
        raise UsageError(f"SLURM refuses {arguments[-1]}: {done.stderr.strip()}")
    return (done.stdout + done.stderr).strip()
