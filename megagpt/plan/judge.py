"""A layout judged: does it fit, how long is a step, what does the run cost (L0: no torch)."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megagpt.config import RunConfig
from megagpt.config.flops import flops_per_token
from megagpt.plan.candidates import Candidate, Cluster, candidates, jobs_of, stage_layers
from megagpt.plan.constants import Constants, constants_for, interval
from megagpt.plan.cost import step_items
from megagpt.plan.device_memory import MEMORY_ITEMS, Stage, fullest, stage_bytes
from megagpt.plan.ds_config import offloads
from megagpt.plan.layout import Layout, busy_start_tokens, padded_model
from megagpt.plan.stages import stage_parameters

ROOM = 0.95
"""Share of a device's memory that a layout may be predicted to take."""
HOST_WATTS = 1.3
"""Power of a node over that of its devices alone: processors, network, fans (DGX H100: 10.2 kW at
most for 8 x 0.7 kW; typical load is lower). Cooling of the building is not counted."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What is predicted for one layout."""

    candidate: Candidate
    cluster: Cluster
    stages: list[dict[str, float]]
    """Bytes by item (MEMORY_ITEMS) on a rank of each pipeline stage."""
    items: dict[str, float]
    """Seconds of a full step by item (ITEMS)."""
    seconds: tuple[float, ...]
    """Of a step in each segment of the schedule."""
    time_ends: tuple[float, float]
    """Factors between which 80% of measured step times lie."""
    memory_ends: tuple[float, float]
    host: dict[str, float]
    """Bytes by item that a node's ranks keep in its memory; empty without offload."""

    @property
    def peak(self) -> float:
        """Bytes on the fullest device."""
        return max(sum(stage.values()) for stage in self.stages)

    @property
    def fits(self) -> bool:
        """Whether that is in the device's memory with some room, and the rest in the host's."""
        return self.peak <= ROOM * self.cluster.device.memory_gb * 1e9 and self.host_fits

    @property
    def host_fits(self) -> bool:
        """Whether what is offloaded is in the host's memory with some room."""
        return sum(self.host.values()) <= ROOM * self.cluster.host * 1e9

    @property
    def surely_fits(self) -> bool:
        """Whether the upper end of the memory's interval is within the device too."""
        return self.peak * self.memory_ends[1] <= self.cluster.device.memory_gb * 1e9

    @property
    def step(self) -> float:
        """Seconds of a full step."""
        return sum(self.items.values())

    @property
    def days(self) -> float:
        """Of the whole run along its ramp; evaluations, checkpoints and failures not counted."""
        segments = self.candidate.config.schedule.segments
        return sum(s.n_steps * t for s, t in zip(segments, self.seconds, strict=True)) / 86_400

    @property
    def gpu_hours(self) -> float:
        """Of the whole run."""
        return self.days * 24 * self.cluster.gpus

    def utilisation(self, recompute: str) -> float:
        """MFU (recompute = none) or HFU (as the run has it) of a full step."""
        config = self.candidate.config
        # A pipeline recomputes its blocks k at a time, but every one of them.
        every = 1 if self.candidate.layout.pipelined else config.parallel.recompute_every
        flops = flops_per_token(config.model, recompute, "full", every)
        tokens = config.schedule.segments[-1].batch_tokens
        device = self.cluster.device
        peak = device.fp32_tflops if config.parallel.dtype == "fp32" else device.tflops
        return flops * tokens / self.step / self.cluster.gpus / (peak * 1e12)

    @property
    def mwh(self) -> float:
        """Of the whole run, processors, network and fans of the nodes included."""
        return self.gpu_hours * self.cluster.device.watts * HOST_WATTS / 1e6

    def as_json(self) -> dict[str, object]:
        """Everything as JSON's types; times in seconds, memory in bytes. NAME_interval holds the
        ends between which 80% of measurements lie."""
        low, high = self.time_ends
        found: dict[str, object] = {
            "layout": str(self.candidate),
            "keys": self.candidate.keys,
            "zero_stage": self.candidate.zero,
            "cluster": dataclasses.asdict(self.cluster),
            "fits": self.fits,
            "memory_bytes": self.peak,
            "memory_interval": [self.peak * end for end in self.memory_ends],
            "stages": self.stages,
            "host_bytes": self.host,
            "step_seconds": self.step,
            "step_interval": [self.step * low, self.step * high],
            "items": self.items,
            "seconds_by_batch": list(self.seconds),
        }
        again = self.candidate.config.parallel.recompute
        for name, recompute in (("mfu", "none"), ("hfu", again)):
            share = self.utilisation(recompute)
            found |= {name: share, f"{name}_interval": [share / high, share / low]}
        for name, value in (
            ("days", self.days),
            ("gpu_hours", self.gpu_hours),
            ("mwh", self.mwh),
            ("dollars", self.gpu_hours * self.cluster.dollars),
        ):
            found |= {name: value, f"{name}_interval": [value * low, value * high]}
        return found


def judge(one: Candidate, cluster: Cluster, constants: Constants | None = None) -> Judgement:
    """The prediction for one layout; by the cluster's profile where no constants are given."""
    constants = constants or constants_for(cluster.gpu)
    config, layout = one.config, one.layout
    segments = config.schedule.segments
    jobs = jobs_of([(one, segment.batch_tokens) for segment in segments], cluster)
    items = {name: np.asarray(v) for name, v in step_items(jobs, constants).items()}
    full = jobs_of([(one, segments[-1].batch_tokens)], cluster)
    passes = float(full.micro_batches[0])
    stages = []
    model = padded_model(config, layout)
    held = stage_parameters(model, layout.pipeline, layout.tensor)
    for index, blocks in enumerate(stage_layers(model, layout.pipeline)):
        flight = min(layout.pipeline - index, passes)
        ends = index in (0, layout.pipeline - 1), index == layout.pipeline - 1
        parts = [np.array([float(value)]) for value in (blocks, flight, *ends, held[index])]
        found = stage_bytes(full, constants, Stage(*parts))
        stages.append({name: float(found[name][0]) for name in MEMORY_ITEMS})
    time, memory = ([float(end[0]) for end in interval(full, what)] for what in ("time", "memory"))
    return Judgement(
        one,
        cluster,
        stages,
        {name: float(v[-1]) for name, v in items.items()},
        tuple(float(t) for t in np.asarray(sum(items.values()))),
        (time[0], time[1]),
        (memory[0], memory[1]),
        _host(one, cluster, max(held)),
    )


def _host(one: Candidate, cluster: Cluster, held: int) -> dict[str, float]:
    """Bytes by item in the memory of a node for its ranks, of `held` parameters at most.

    DeepSpeed (stage3.py) keeps the weights in fp32 there with their moments, gradients in fp32
    twice (as they add up, and for the update), and the weights themselves where they are
    offloaded too. On NVMe lies the rest but the gradients that add up; the host has buffers for
    it: some whole sub-groups of the optimizer's (optimizer_utils.py), and its own of the weights'.
    """
    tree, part, ranks = one.tree, held / one.layout.data, min(cluster.per_node, cluster.gpus)
    place, weights = offloads(tree, "optimizer"), offloads(tree, "param")
    states, own = tree.get("offload_optimizer") or {}, tree.get("offload_param") or {}
    piece = min(part, tree.get("sub_group_size", 1e9)) * states.get("buffer_count", 4)
    kept = own.get("buffer_count", 5) * own.get("buffer_size", 1e8)
    width = 4 if one.config.parallel.dtype == "fp32" else 2
    sizes = {
        "optimizer": 12 * part * (place == "cpu"),
        "gradients": 4 * part * (bool(place) + (place == "cpu")),
        "weights": width * part * (weights == "cpu"),
        "buffers": 4 * piece * (place == "nvme") + width * kept * (weights == "nvme"),
    }
    return {name: size * ranks for name, size in sizes.items() if size}


def search(config: RunConfig, cluster: Cluster, most: int = 10) -> list[Judgement]:
    """The fastest layouts that fit, at most `most`, best first; empty where none fits.

    Those that might not fit after all stand back while there are others: nine in ten measured
    memories are below the interval's upper end.
    """
    found, constants = list(candidates(config, cluster)), constants_for(cluster.gpu)
    if not found:
        return []
    full = config.schedule.segments[-1].batch_tokens
    jobs = jobs_of([(one, full) for one in found], cluster)
    seconds = np.asarray(sum(step_items(jobs, constants).values()))
    memory = np.asarray(sum(fullest(jobs, constants).values()))
    # Those that nearly fit are judged stage by stage below.
    near = memory <= 1.1 * ROOM * jobs.memory
    order = [found[i] for i in np.argsort(np.where(near, seconds, np.inf))[: int(near.sum())]]
    safe: list[Judgement] = []
    tight: list[Judgement] = []
    for one in order:
        if len(safe) == most:
            break
        judged = judge(one, cluster, constants)
        if judged.fits:
            (safe if judged.surely_fits else tight).append(judged)
    return safe or tight[:most]


def decided_by(loser: Judgement, winner: Judgement) -> tuple[str, float]:
    """The item in which a layout loses most, and by how many seconds."""
    lost = {name: loser.items[name] - winner.items[name] for name in winner.items}
    name = max(lost, key=lambda item: lost[item])
    return name, lost[name]


def what_works(config: RunConfig, cluster: Cluster, most: int = 3) -> str:
    """Layouts that fit, as lines to follow; else the nearest numbers of devices that can, fewer
    and more."""
    # The fastest of each split: the same with half the micro-batch is no other way.
    splits: dict[Layout, Judgement] = {}
    for one in search(config, cluster, 3 * most):
        splits.setdefault(one.candidate.layout, one)
    if splits:
        lines = [f"  {one.candidate}: {' '.join(one.candidate.keys)}" for one in splits.values()]
        return f"what works on {cluster.gpus:,} {cluster.gpu}:\n" + "\n".join(lines[:most])
    gpus, node = cluster.gpus, cluster.per_node
    powers = [2**n for n in range(21)]
    # Whole nodes just below, then powers of two: a batch may have no work for so many.
    below = [n for n in range((gpus - 1) // node * node, 0, -node)][:8]
    fewer = _nearest(config, cluster, [*below, *(n for n in reversed(powers) if n < gpus)])
    more = _nearest(config, cluster, [n for n in powers if n > gpus])
    lines = [text for text in (fewer, more) if text]
    if not lines:
        return f"nothing works on {gpus:,} {cluster.gpu}, nor on any other number of them"
    return f"nothing works on {gpus:,} {cluster.gpu}; " + "\nand ".join(lines)


def _nearest(config: RunConfig, cluster: Cluster, counts: Sequence[int]) -> str:
    """The first of these numbers of devices on which something works, and what; empty: none."""
    for gpus in counts:
        if best := search(config, dataclasses.replace(cluster, gpus=gpus), 1):
            one = best[0].candidate
            return f"{gpus:,} can do it: {one}: {' '.join(one.keys)}"
    return ""


def ramp_days(one: Judgement) -> float:
    """Days until the batch is full; 0 where it is from the start."""
    schedule = one.candidate.config.schedule
    pairs = zip(schedule.segments, one.seconds, strict=True)
    tokens = min(schedule.ramp_tokens, schedule.end_tokens)
    if len(one.seconds) == 1:
        return 0.0
    return sum(s.n_steps * t for s, t in pairs if s.first_tokens < tokens) / 86_400


def with_higher_start(one: Judgement) -> Judgement | None:
    """The same run with a ramp that starts where every data rank has work; None where it does."""
    config, layout = one.candidate.config, one.candidate.layout
    start = busy_start_tokens(config, layout)
    if start is None or start <= config.schedule.start_tokens:
        return None
    schedule = dataclasses.replace(
        config.schedule, ramp_start_tokens=start, ramp_increment_tokens=start
    )
    higher = dataclasses.replace(config, schedule=schedule)
    return judge(dataclasses.replace(one.candidate, config=higher), one.cluster)


def refusal(one: Judgement) -> str:
    """Why a layout that does not fit is refused, and what works instead."""
    worst = max(range(len(one.stages)), key=lambda n: sum(one.stages[n].values()))
    what, each, whose = f"stage {worst}", "a GPU", f"a {one.cluster.gpu}'s"
    parts, memory, more = one.stages[worst], one.cluster.device.memory_gb, ""
    if not one.host_fits:
        what, each, whose = "offload", "of a node's host", "its"
        parts, memory, more = one.host, one.cluster.host, " (--host-memory)"
    items = sorted(parts.items(), key=lambda item: -item[1])
    told = ", ".join(f"{name} {size / 1e9:,.1f}" for name, size in items if size > 5e7)
    return (
        f"{one.candidate}: {what} needs {sum(parts.values()) / 1e9:,.1f} GB {each} ({told}), and "
        f"{ROOM:.0%} of {whose} memory{more} are {memory * ROOM:,.0f} GB; "
        f"{what_works(one.candidate.config, one.cluster)}"
    )
