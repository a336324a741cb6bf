"""What a run's checkpoints take of the disk, in bytes (L0, stdlib only); what it takes of a device
is device_memory.py's."""

from megagpt.config import RunConfig
from megagpt.config.flops import parameters
from megagpt.config.presets import ModelConfig

BYTES_PER_PARAMETER = 12
"""Of a checkpoint: the fp32 weight and Adam's two fp32 moments."""
WRITE_RATE = 0.5e9
"""Bytes/s that a host is taken to write to a shared file system; most are faster."""


def checkpoint_bytes(model: ModelConfig) -> int:
    """One checkpoint, whatever the layout; the headers of its files and the padding of the
    vocabulary are not counted."""
    return BYTES_PER_PARAMETER * parameters(model)


def checkpoints_kept(config: RunConfig) -> int:
    """Checkpoints that lie on the disk at once, at most: the newest, milestones, one half-written.

    Milestones are the checkpoints of checkpoint.keep_every_tokens.
    """
    every = config.checkpoint.keep_every_tokens
    milestones = config.schedule.end_tokens // every if every else 0
    return config.checkpoint.keep_last + milestones + 1
