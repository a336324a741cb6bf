"""What was predicted beside what a run recorded, item by item (L0: numpy, no torch).

There is a prediction where the run file came from `megagpt plan --write`, whose plan.json names
the devices, or where the devices that the run is on have a profile of `--calibrate`.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagpt.config import RunConfig
from megagpt.errors import UsageError
from megagpt.plan.accelerators import ACCELERATORS, accelerator_in
from megagpt.plan.candidates import Cluster, candidate, jobs_of
from megagpt.plan.constants import constants_for, interval, read_profile
from megagpt.plan.cost import ITEMS, step_items
from megagpt.plan.judge import judge
from megagpt.plan.layout import world_in

RECENT = 200
"""Steps of the last batch size that are looked at."""
PARTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "step": (ITEMS, ("step_s",)),
    # Tensor-parallel collectives are within the passes; a bubble is a wait for other stages.
    "forward and backward": (("compute", "tensor"), ("forward_s", "backward_s")),
    "communication": (("bubble", "pipeline", "data"), ("communication_s",)),
    "optimizer": (("optimizer",), ("optimizer_s",)),
}
"""Name -> items of the cost model, and what a run's record calls them."""


@dataclass(frozen=True, slots=True)
class Beside:
    """One item."""

    name: str
    unit: str
    """s or GB."""
    predicted: float
    measured: float
    ends: tuple[float, float] | None = None
    """80% of measurements lie between them; None where no interval is known."""

    @property
    def off(self) -> float:
        """How much more was measured, as a share of the prediction; NaN where that is 0."""
        return self.measured / self.predicted - 1 if self.predicted else float("nan")


def beside(
    config: RunConfig, facts: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]
) -> list[Beside]:
    """The step, its parts and the memory of rank 0; `facts` is run.json. Empty where nothing was
    predicted, nothing measured, or the run cannot be planned as it is."""
    recent = _recent(steps[-5 * RECENT :])
    try:
        cluster = _cluster(config, facts, world_in(str(facts.get("layout", ""))))
        return _beside(config, cluster, recent) if cluster and recent else []
    except (UsageError, ValueError, TypeError):
        # A plan, a profile or a record that is not ours: the curves are shown all the same.
        return []


def _beside(config: RunConfig, cluster: Cluster, recent: list[Mapping[str, Any]]) -> list[Beside]:
    constants = constants_for(cluster.gpu)
    one = candidate(config, cluster.gpus)
    jobs = jobs_of([(one, int(recent[-1]["batch_tokens"]))], cluster)
    items = {name: float(seconds[0]) for name, seconds in step_items(jobs, constants).items()}
    low, high = (float(end[0]) for end in interval(jobs, "time"))
    found = []
    for name, seconds in parts_of(recent).items():
        predicted = sum(items[part] for part in PARTS[name][0])
        ends = (predicted * low, predicted * high) if name == "step" else None
        found.append(Beside(name, "s", predicted, seconds, ends))
    if most := peak_of(recent):
        # Rank 0 records, and is on the first stage.
        first = sum(judge(one, cluster, constants).stages[0].values()) / 1e9
        less, more = (float(end[0]) * first for end in interval(jobs, "memory"))
        found.append(Beside("memory", "GB", first, most / 1e9, (less, more)))
    return found


def parts_of(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Median seconds by name of PARTS, those that every record has."""
    return {
        name: statistics.median(sum(float(one[key]) for key in keys) for one in records)
        for name, (_, keys) in PARTS.items()
        if all(key in one for one in records for key in keys)
    }


def peak_of(records: Sequence[Mapping[str, Any]]) -> float:
    """The highest memory of rank 0 in bytes, its device's or else its host's; 0 where none is."""
    both = [[r[k] for r in records if k in r] for k in ("memory_peak_bytes", "host_memory_bytes")]
    return float(max(both[0] or both[1] or [0]))


def _recent(steps: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The last steps of one batch size, those that were looked at more closely left out."""
    known = [s for s in steps if "step_s" in s and "batch_tokens" in s and "details_s" not in s]
    return [s for s in known if s["batch_tokens"] == known[-1]["batch_tokens"]][-RECENT:]


def _cluster(config: RunConfig, facts: Mapping[str, Any], world: int) -> Cluster | None:
    """The devices: of the plan that wrote the run file, else of a profile for those it runs on."""
    plan = Path(config.parallel.ds_config).with_name("plan.json")
    if config.parallel.ds_config.endswith(".json") and plan.exists():
        try:
            found = Cluster(**json.loads(plan.read_text(encoding="utf-8"))["cluster"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return found if found.gpu in ACCELERATORS and found.gpus == world else None
    computing = facts.get("computing")
    device = str(computing.get("device", "")) if isinstance(computing, dict) else ""
    gpu = "cpu" if device == "cpu" else accelerator_in(device)
    if not gpu or (profile := read_profile(gpu)) is None:
        return None
    place = profile.get("cluster", {})
    return Cluster(gpu=gpu, gpus=world, **{k: place[k] for k in PLACE if k in place})


PLACE = ("per_node", "domain", "node_gb", "price", "host_gb")
"""What a profile remembers of its cluster."""
