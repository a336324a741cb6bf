"""A judgement as a picture: memory by stage, days along the ramp, days against devices (L0)."""

import dataclasses
from pathlib import Path

import numpy as np

from megagpt.errors import UsageError
from megagpt.plan.device_memory import MEMORY_ITEMS
from megagpt.plan.judge import ROOM, Judgement, search


def draw(one: Judgement, path: Path) -> None:
    """Writes the picture in the form that the path's ending names. Raises UsageError where it
    cannot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    memory, ramp, devices = figure.subplots(1, 3)
    bottom = np.zeros(len(one.stages))
    for item in MEMORY_ITEMS:
        sizes = np.array([stage[item] for stage in one.stages]) / 1e9
        memory.bar(range(len(sizes)), sizes, bottom=bottom, label=item)
        bottom += sizes
    size = one.cluster.device.memory_gb
    memory.axhline(size, color="black", label=f"{one.cluster.gpu}")
    memory.axhline(size * ROOM, color="black", linestyle=":", label="most that is planned")
    memory.set(xlabel="pipeline stage", ylabel="GB of a GPU", title="Memory")
    memory.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    segments = one.candidate.config.schedule.segments
    tokens = [0, *(segment.last_tokens / 1e9 for segment in segments)]
    days = np.cumsum([0, *(s.n_steps * t for s, t in zip(segments, one.seconds, strict=True))])
    low, high = one.time_ends
    ramp.plot(tokens, days / 86_400)
    ramp.fill_between(tokens, days * low / 86_400, days * high / 86_400, alpha=0.2, label="80%")
    ramp.set(xlabel="billion tokens", ylabel="days", title="Time along the run")
    ramp.legend()
    counts = [2**n for n in range(14) if 1 / 16 <= 2**n / one.cluster.gpus <= 16]
    best = [
        (n, found[0].days)
        for n in counts
        if (found := search(one.candidate.config, dataclasses.replace(one.cluster, gpus=n), 1))
    ]
    if best:
        devices.loglog(*zip(*best, strict=True), marker="o", label="fastest layout that fits")
    devices.loglog([one.cluster.gpus], [one.days], marker="*", markersize=14, label="this one")
    devices.set(xlabel="GPUs", ylabel="days", title="Time against GPUs")
    devices.legend()
    figure.suptitle(str(one.candidate))
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise UsageError(f"--picture {path}: cannot be written: {error}") from None
