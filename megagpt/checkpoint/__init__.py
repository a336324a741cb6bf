"""Checkpoints: saved by any layout, verified, read by any other (L2)."""

from megagpt.checkpoint.load import resume
from megagpt.checkpoint.model import load_model
from megagpt.checkpoint.record import Manifest, list_checkpoints, verify
from megagpt.checkpoint.save import Saver

__all__ = ["Manifest", "Saver", "list_checkpoints", "load_model", "resume", "verify"]
