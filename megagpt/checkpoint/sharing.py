"""A model that one device cannot hold, shared out over the ranks of a launcher for reading (L2).

    deepspeed --num_gpus 4 --module megagpt generate RUN_DIR --split --prompt "Once"

Every rank holds its part of each matrix, as in training under a tensor split, reads only what it
needs of the checkpoint one parameter at a time, and does the same as all others: they draw the same
tokens of the same logits.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tiktoken
import torch
import torch.distributed as dist
from torch import Tensor

from megagpt.checkpoint.export import filled, open_weights
from megagpt.cluster.process import join, leave, prepare_environment
from megagpt.cluster.ranks import discover
from megagpt.config import ModelConfig
from megagpt.engine import split
from megagpt.engine.pipeline import split_kind
from megagpt.engine.tensor import TensorGroup, tensor_parts
from megagpt.errors import UsageError
from megagpt.model import GPT

__all__ = ["leave", "load_shared"]


def load_shared(
    run: Path, dtype: torch.dtype
) -> tuple[GPT, tiktoken.Encoding, dict[str, Any], int]:
    """(this rank's part of the model, its tokenizer, facts, the rank). All ranks call it, and
    leave() at their end.

    Raises UsageError without a launcher and for a model that so many ranks cannot share.
    """
    ranks = discover(os.environ)
    if ranks.world < 2:
        raise UsageError(
            "--split: one process has nobody to share with; start it as deepspeed --num_gpus 4 "
            "--module megagpt generate RUN_DIR --split (or chat, or serve)"
        )
    weights = open_weights(run, compare=ranks.local_rank == 0)
    config = shared_config(weights.config.model, ranks.world)
    encoding = weights.tokenizer()
    prepare_environment(ranks, os.environ)
    join(ranks)
    agreed = [weights.folder]
    dist.broadcast_object_list(agreed, src=0)
    if agreed[0] != weights.folder:
        # A run that trains meanwhile has saved between the looks of two ranks.
        weights = open_weights(agreed[0], compare=ranks.local_rank == 0)
    with torch.device("meta"):
        # None: all ranks. The group itself, held by the model, would outlive leave(), and its
        # threads would now and then abort the process at exit.
        classes = tensor_parts(TensorGroup(None, ranks.rank, ranks.world))
        model = GPT(config, classes).to(dtype)

    def part(name: str, shape: Sequence[int]) -> Tensor:
        kind = split_kind(name)
        whole = weights.whole(name, split.whole_shape(shape, kind, ranks.world))
        return split.take(whole, kind, ranks.rank, ranks.world)

    filled(model, "cuda" if torch.cuda.is_available() else "cpu", part)
    return model, encoding, weights.told(), ranks.rank


def shared_config(config: ModelConfig, ranks: int) -> ModelConfig:
    """The model with its vocabulary padded for so many ranks. Raises UsageError for one that they
    cannot share."""
    if config.family != "gpt2" or config.n_head % ranks:
        raise UsageError(
            f"--split: {ranks} ranks cannot share a model of family {config.family!r} with "
            f"{config.n_head} heads; the family must be gpt2, and the ranks divide the heads"
        )
    return replace(config, vocab_multiple=config.vocab_multiple * ranks)
