"""Checkpoints: saved by any layout, verified, read by any other (L2)."""

from megagpt.checkpoint.export import load_model
from megagpt.checkpoint.load import resume, verify
from megagpt.checkpoint.record import CheckpointRecord, list_checkpoints
from megagpt.checkpoint.save import Saver
from megagpt.checkpoint.start import start_from

__all__ = [
    "CheckpointRecord",
    "Saver",
    "list_checkpoints",
    "load_model",
    "resume",
    "start_from",
    "verify",
]
