"""Constants of one cluster, from runs that trained on it (L0: numpy, no torch).

A run records the time of every step, of its parts, and its memory anyway (metrics.jsonl). A few
constants are fitted to them, drawn towards what the planner takes without: speed of computations,
cost of a micro-step that does not shrink with it, of a step, exposed traffic of gradients, and
memory beside what is counted.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from megagpt.config import RunConfig, load_run
from megagpt.errors import UsageError
from megagpt.files import write_file
from megagpt.plan.beside import PARTS, parts_of, peak_of
from megagpt.plan.candidates import Candidate, Cluster, candidate, jobs_of
from megagpt.plan.constants import CONSTANTS, profile_path
from megagpt.plan.cost import step_items
from megagpt.plan.jobs import Column
from megagpt.plan.judge import judge
from megagpt.plan.layout import world_in

FITTED = (
    "framework.megagpt", "launch.megagpt", "launch.megagpt-eager", "data_exposed.megagpt",
    "step.megagpt",
)  # fmt: skip
"""Constants that may move, each by a logarithm of about 1."""
NOISE = {"step": 0.02, "forward and backward": 0.02, "optimizer": 0.1, "communication": 0.1}
"""Relative error of each that is taken for noise."""
Measured = Mapping[str, float]
"""Seconds by name of PARTS, those that a record has."""
Steps = list[tuple[Candidate, int, Cluster, Measured]]
"""Layout, tokens of a step, devices and what was measured."""


def calibrate(folders: Sequence[str], cluster: Cluster) -> Path:
    """Fits the profile of the cluster's devices to these runs, writes it and returns its path."""
    steps: Steps = []
    spare: list[float] = []
    for folder in folders:
        config, world, records = _read(Path(folder))
        one, where = candidate(config, world), replace(cluster, gpus=world)
        steps += [(one, tokens, where, each) for tokens, each in _steps(records, folder)]
        # Rank 0 records, and is on the first stage.
        first = sum(judge(one, where, CONSTANTS).stages[0].values())
        predicted = first - 1e9 * CONSTANTS["overhead.megagpt"]
        spare += [most - predicted] if (most := peak_of(records)) else []
    own = _fit(steps)
    if spare:
        own["overhead.megagpt"] = max(0.0, statistics.median(spare) / 1e9)
    path = profile_path(cluster.gpu)
    path.parent.mkdir(parents=True, exist_ok=True)
    tree = {"runs": list(folders), "cluster": asdict(cluster), "constants": own}
    write_file(path, json.dumps(tree, indent=1) + "\n")
    return path


def _fit(steps: Steps) -> dict[str, float]:
    """Gauss-Newton on logarithms, drawn towards today's values."""
    jobs = [jobs_of([(one, tokens)], where) for one, tokens, where, _ in steps]
    start = {k: CONSTANTS.get(k, CONSTANTS[k.partition(".")[0]]) for k in FITTED}
    # One rank has something to say to nobody, though it waits a moment for itself.
    known = [
        (i, part)
        for i, (_, _, where, each) in enumerate(steps)
        for part in each
        if each[part] > 0 and (part != "communication" or where.gpus > 1)
    ]
    seconds = np.array([steps[i][3][part] for i, part in known])
    noise = np.array([NOISE[part] for _, part in known])

    def told(x: Column) -> Column:
        own = {k: v * np.exp(m) for (k, v), m in zip(start.items(), x, strict=True)}
        items = [step_items(job, CONSTANTS | own) for job in jobs]
        return np.log([sum(float(items[i][k][0]) for k in PARTS[part][0]) for i, part in known])

    x = np.zeros(len(start))
    # Devices that the table does not know at all may be far off: then first the speed alone.
    off = float(np.median(np.log(seconds) - told(x)))
    x[0] = off if abs(off) > np.log(3) else 0.0
    middle = x
    for _ in range(20):
        base = told(x)
        slope = np.stack([(told(x + 0.01 * e) - base) / 0.01 for e in np.eye(len(x))], axis=1)
        left = np.concatenate([slope / noise[:, None], np.eye(len(x))])
        right = np.concatenate([(np.log(seconds) - base) / noise, middle - x])
        change = np.clip(np.linalg.lstsq(left, right, rcond=None)[0], -1, 1)
        x = x + change
        if np.abs(change).max() < 1e-4:
            break
    return {k: float(v * np.exp(m)) for (k, v), m in zip(start.items(), x, strict=True)}


def _read(folder: Path) -> tuple[RunConfig, int, list[dict[str, float]]]:
    """Configuration, ranks and records of a run folder."""
    try:
        config = load_run(folder / "config.toml")
        layout = str(json.loads((folder / "run.json").read_text(encoding="utf-8"))["layout"])
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UsageError(
            f"--calibrate {folder}: must be a run folder with config.toml, run.json and "
            f"metrics.jsonl ({error})"
        ) from None
    records = []
    for line in lines:
        try:
            records.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            continue
    return config, world_in(layout), records


def _steps(records: Sequence[Mapping[str, float]], folder: str) -> list[tuple[int, Measured]]:
    """Median seconds of the steps of each batch size; the first two of each pay for starts."""
    found: dict[int, list[Mapping[str, float]]] = {}
    for record in records:
        if "step_s" in record and "batch_tokens" in record and "details_s" not in record:
            found.setdefault(int(record["batch_tokens"]), []).append(record)
    steps: list[tuple[int, Measured]] = [
        (n, parts_of(those[2:])) for n, those in found.items() if len(those) > 4
    ]
    if not steps:
        raise UsageError(
            f"--calibrate {folder}: needs more than four recorded steps of one batch size"
        )
    return steps
