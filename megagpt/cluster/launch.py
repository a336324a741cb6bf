"""`megagpt launch slurm RUN.toml`: a job of SLURM made for one run, checked before it is queued.

    megagpt launch slurm RUN.toml --nodes 2 --gpus-per-node 8 --time 24:00:00 --submit

The script lies in the run folder: RUN_DIR/job.sbatch, with its log beside it in RUN_DIR/job.log.
A sweep is an array whose tasks train in folders of their own below RUN_DIR.
"""

import argparse
import math
import shutil
import statistics
import subprocess
from pathlib import Path
from typing import Any

from megagpt.cluster.job import Job, directives, lead_s, script, seconds_of, sweep_of, time_of
from megagpt.config import RunConfig, load_run
from megagpt.errors import EXIT_OK, UsageError
from megagpt.plan.ds_config import read_ds_config, resolve
from megagpt.plan.layout import Layout, layout_of, spans_hosts

TEMPLATE = Path("launch/slurm.sbatch")
"""In the root of the repository, where jobs are submitted."""
RECENT = 100
"""Steps that tell a run's speed."""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command to the command line."""
    made = commands.add_parser(
        "launch",
        help="write and submit a job of SLURM that is made for a run",
        description="Writes job scripts. Without a batch system see launch/multinode.sh.",
    )
    systems = made.add_subparsers(metavar="SYSTEM", required=True)
    slurm = systems.add_parser(
        "slurm",
        help="a job of SLURM, one task for each GPU",
        description="Checks a run file against nodes x GPUs and writes RUN_DIR/job.sbatch. The job "
        "saves before its end and when it is preempted, and is queued again until the run is done.",
    )
    slurm.add_argument("file", metavar="RUN.toml", help="run file")
    slurm.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="override of a key"
    )
    slurm.add_argument("--nodes", type=int, required=True, metavar="N")
    slurm.add_argument("--gpus-per-node", type=int, required=True, metavar="N")
    slurm.add_argument(
        "--time", required=True, metavar="T", help="limit of each start, as SLURM reads it"
    )
    slurm.add_argument("--cpus-per-task", type=int, default=8, metavar="N", help="cores of a rank")
    for name in ("partition", "account", "qos"):
        slurm.add_argument(f"--{name}", default="", metavar="NAME")
    slurm.add_argument("--name", default="", help="of the job (default: the run folder's)")
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
    slurm.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes the script. Raises UsageError for a run that cannot go so, and what SLURM refuses."""
    config = load_run(args.file, args.overrides)
    job = job_of(args, config)
    sweep = sweep_of(args.sweep, config.output) if args.sweep else []
    for overrides in sweep or [[]]:
        layout = check_layout(load_run(args.file, [*args.overrides, *overrides]), job)
    steps = recent_steps(Path(config.output))
    lead = lead_s(config, job, max((step["step_s"] for step in steps), default=0.0))
    starts = starts_needed(config, steps, job.seconds - lead)
    log = f"{config.output}/{'job-%a.log' if sweep else 'job.log'}"
    text = script(
        TEMPLATE.read_text(encoding="utf-8"),
        directives(job, lead, log, len(sweep)),
        [args.file, *args.overrides],
        sweep,
    )
    count = 1
    if args.chain is not None:
        count = args.chain or starts
        if count < 1:
            why = "is complete" if steps else "has no measured speed yet; say --chain N"
            raise UsageError(f"--chain: the run in {config.output} {why}")
    path = Path(config.output) / "job.sbatch"
    # SLURM drops the log of a job whose folder is not there.
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(f"{path}: {layout}, {job.nodes} x {job.gpus_per_node} GPUs, {time_of(job.seconds)}")
    slow = spans_hosts(layout, job.gpus_per_node)
    if slow:
        print(f"slow: {slow}")
    print(f"told to save and stop {lead} s before its end; log: {log}")
    if starts and not sweep:
        print(f"at the speed of the run's latest steps: {starts} starts of that time")
    for index, task in enumerate(sweep):
        print(f"task {index}: {' '.join(task)}")
    if args.submit:
        print("submitted: " + " ".join(submit(path, count)))
    else:
        test(path)
        by_hand = f", or sbatch {path}" if count == 1 else f", which queues {count} jobs"
        print(f"not submitted: say --submit{by_hand}")
    return EXIT_OK


def job_of(args: argparse.Namespace, config: RunConfig) -> Job:
    """What is asked of SLURM. Raises UsageError for what no job can be."""
    if not TEMPLATE.is_file():
        raise UsageError(
            f"{TEMPLATE}: not in {Path.cwd()}; call this in the root of the repository, from where "
            "the job will run"
        )
    for name in ("nodes", "gpus_per_node", "cpus_per_task"):
        if getattr(args, name) < 1:
            option = name.replace("_", "-")
            raise UsageError(f"--{option} {getattr(args, name)}: must be 1 or more")
    if args.chain is not None and args.sweep:
        raise UsageError(
            "--chain with --sweep: the tasks of a sweep are queued again by themselves; leave one "
            "of the two out"
        )
    return Job(
        nodes=args.nodes,
        gpus_per_node=args.gpus_per_node,
        cpus_per_task=args.cpus_per_task,
        seconds=seconds_of(args.time),
        name=args.name or Path(config.output).name,
        partition=args.partition,
        account=args.account,
        qos=args.qos,
        requeue=args.chain is None,
    )


def check_layout(config: RunConfig, job: Job) -> Layout:
    """The run on the job's GPUs. Raises UsageError with every reason why it cannot be."""
    layout = layout_of(config, job.nodes * job.gpus_per_node)
    resolve(config, layout, read_ds_config(config.parallel.ds_config))
    return layout


def recent_steps(folder: Path) -> list[dict[str, Any]]:
    """Records of the latest steps of a run; none before the first."""
    from megagpt.log import read_metrics

    if not (folder / "metrics.jsonl").exists():
        return []
    return [record for record in read_metrics(folder) if "loss" in record][-RECENT:]


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


def test(path: Path) -> None:
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
