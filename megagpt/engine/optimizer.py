"""AdamW with a decay and a no-decay group (L2)."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from megagpt.config import OptimizerConfig
from megagpt.model import decays


def build_optimizer(
    config: OptimizerConfig, named_parameters: Iterable[tuple[str, nn.Parameter]]
) -> torch.optim.AdamW:
    """torch's fused AdamW (nothing to compile) over parameters grouped by canonical name.

    By name, never by shape: under ZeRO-3 a parameter's own shape is that of an empty shard.
    Another optimizer also needs its keys in OptimizerConfig, its own `ask_before_update`, and its
    moments in `slices.create_moments` and `slices.STATES`.
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


def ask_before_update(adam: torch.optim.AdamW, refuses: Callable[[], bool]) -> None:
    """Asks before each of AdamW's updates; one that is refused leaves weights, moments and count.

    By the mark that torch's fused kernels take from a gradient scaler: found_inf = 1 stands for
    gradients that are no good. AdamW stays AdamW, which DeepSpeed knows by its type.
    """

    def ask(adam: Any, *_: Any) -> None:
        adam.found_inf = torch.ones(()) if refuses() else None

    adam.register_step_pre_hook(ask)
