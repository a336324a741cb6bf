"""Where a trained model computes, and in what (L3)."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megagpt.errors import UsageError

if TYPE_CHECKING:
    import argparse

    import tiktoken

    from megagpt.config import ModelConfig
    from megagpt.model import GPT

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Names in a run file, and torch's."""


def add_run_dir(parser: "argparse.ArgumentParser") -> None:
    """Adds RUN_DIR."""
    parser.add_argument(
        "folder", metavar="RUN_DIR", type=Path, help="run folder, checkpoint or folder of weights"
    )


def add_placing(parser: "argparse.ArgumentParser") -> None:
    """Adds --dtype and --device."""
    parser.add_argument(
        "--dtype",
        choices=list(DTYPES),
        default="fp32",
        help="weights and activations (default: fp32)",
    )
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: cuda if any)")


def add_split(parser: "argparse.ArgumentParser", command: str) -> None:
    """Adds --split."""
    parser.add_argument(
        "--split",
        action="store_true",
        help="share the model out over the ranks of a launcher, for one that no device holds: "
        f"deepspeed --num_gpus 4 --module megagpt {command} RUN_DIR --split",
    )


def load_placed(
    folder: Path, dtype: str, device: str | None, rows: int = 0
) -> tuple["GPT", "tiktoken.Encoding", dict[str, Any]]:
    """What load_model gives of a run, a checkpoint or a folder of weights, for --dtype, --device.

    rows: of how many texts at a time it reads and writes tokens, if it is for that; on a CPU in
    fp32 it then has the products of megagpt.use.reading. Raises UsageError for a device that this
    machine lacks, and what load_model raises.
    """
    import torch

    from megagpt.checkpoint import load_model

    place = device_named(device)
    if not rows or place != "cpu" or dtype != "fp32":
        return load_model(folder, place, getattr(torch, DTYPES[dtype]))
    from megagpt.use.reading import READING, store

    loaded = load_model(folder, place, torch.float32, READING)
    store(loaded[0], rows)
    return loaded


def device_named(name: str | None) -> str:
    """The device to compute on; None: a GPU if there is one. Raises UsageError for one that this
    machine lacks."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # Read back: a device may make tensors that hold nothing.
        torch.zeros(1, device=name).tolist()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {name}: not on this machine ({reason}); use cpu") from None
    return name


def cache_bytes(config: "ModelConfig", positions: Sequence[int], itemsize: int) -> int:
    """Bytes of keys and values of rows of so many positions, of all heads."""
    kept = (min(n, config.band(i) or n) for n in positions for i in range(config.n_layer))
    return 2 * config.d_model * itemsize * sum(kept)
