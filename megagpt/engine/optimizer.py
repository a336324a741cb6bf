"""AdamW with a decay and a no-decay group (L2)."""

from collections.abc import Iterable

import torch
from torch import nn

from megagpt.config import OptimizerConfig
from megagpt.model import decays


def build_optimizer(
    config: OptimizerConfig, named_parameters: Iterable[tuple[str, nn.Parameter]]
) -> torch.optim.AdamW:
    """torch's fused AdamW (nothing to compile) over parameters grouped by canonical name.

    By name, never by shape: under ZeRO-3 a parameter's own shape is that of an empty shard.
    """
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in named_parameters:
        groups[decays(name)].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": config.weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        lr=0.0,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )
