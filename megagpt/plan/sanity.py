"""What is odd about a run though it can go: ramps that never end, epochs, disk (L0)."""

from collections.abc import Iterator
from itertools import pairwise

from megagpt.config import RunConfig
from megagpt.plan.corpora import manifest, mismatches
from megagpt.plan.disk import checkpoint_bytes, checkpoints_kept

MOST_EPOCHS = 4
"""Muennighoff et al. 2023: until then a corpus that is read again teaches almost as new text."""


def oddities(config: RunConfig) -> Iterator[str]:
    """A sentence for each; the run goes on with all of them."""
    schedule = config.schedule
    total = schedule.total_tokens
    for key, what in (
        ("warmup_tokens", "the learning rate never reaches its peak"),
        ("ramp_tokens", "the batch never reaches batch_tokens"),
        ("decay_tokens", "the learning rate never reaches its floor"),
    ):
        value = getattr(schedule, key)
        if value > total and (
            key != "ramp_tokens" or schedule.start_tokens < schedule.batch_tokens
        ):
            yield (
                f"schedule.{key} = {value}: {what} within total_tokens ({total}); lower it or "
                "train longer"
            )
    yield from mismatches(config)
    for path, epochs in epochs_of(config):
        yield read_times(path, epochs) + (
            f"; more than about {MOST_EPOCHS} teach little more (Muennighoff et al. 2023)"
            if epochs > MOST_EPOCHS
            else ""
        )


def disk(config: RunConfig) -> str:
    """What checkpoints take."""
    one, kept = checkpoint_bytes(config.model), checkpoints_kept(config)
    return (
        f"disk: {one * kept / 1e9:,.4g} GB for at most {kept} checkpoints at once of "
        f"{one / 1e9:,.4g} GB"
    )


def read_times(path: str, epochs: float) -> str:
    """How often a corpus is read, in words."""
    return f"{path} is read {epochs:,.{0 if epochs >= 100 else 2}f} times"


def epochs_of(config: RunConfig) -> Iterator[tuple[str, float]]:
    """Path and epochs of every training corpus that is prepared here."""
    data, total = config.data, config.schedule.end_tokens
    turns = [0, *(change.at_tokens for change in data.changes), total]
    weights = [tuple(source.weight for source in data.train), *(c.weights for c in data.changes)]
    for index, source in enumerate(data.train):
        try:
            size = int(manifest(source.path)["totals"]["tokens"])
        except (ValueError, KeyError, TypeError):
            continue
        read = sum(
            max(0, min(end, total) - first) * w[index] / sum(w)
            for (first, end), w in zip(pairwise(turns), weights, strict=True)
        )
        if size:
            yield source.path, read / size
