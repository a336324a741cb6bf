"""Initial weights: a function of (seed, canonical name, shape, model), whatever the split.

Every tensor is drawn by itself from a counter-based generator (Philox) whose key is a digest of
the seed and the tensor's canonical name, in blocks of a fixed number of elements. No generator is
shared between tensors, so the order of creation, the rank and the number of threads cannot change
a weight: a rank that owns a slice draws the whole tensor and keeps its slice.

Sources: GPT-2 section 2.3 and GPT-3 section 2.1 (N(0, 0.02), residual projections divided by
sqrt(2 n_layer)); GPT-1 section 4.1 (N(0, 0.02)); Image GPT section 3.3 with OpenAI's code.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from megagpt.config.presets import ModelConfig

BLOCK = 1 << 22
"""Elements of a tensor that share one stretch of the generator's counter."""


def initial_value(name: str, shape: Sequence[int], config: ModelConfig, seed: int) -> Tensor:
    """The initial value of one whole tensor, fp32 on the CPU.

    `name` is canonical (``h.3.mlp.c_fc.weight``) and `shape` that of the unsplit tensor. Rows of
    `wte.weight` beyond the vocabulary (padding) are zero, and the rows before them do not depend
    on how many there are.
    """
    if name.endswith(".bias"):
        return torch.zeros(*shape)
    if len(shape) == 1:  # the gain of a LayerNorm
        return torch.ones(*shape)
    std = _std(name, config)
    if std == 0.0:
        return torch.zeros(*shape)
    rows = min(shape[0], config.n_embedding) if name == "wte.weight" else shape[0]
    drawn = _normal((rows, *shape[1:]), std, f"{seed}/{name}")
    if rows == shape[0]:
        return drawn
    padded = torch.zeros(*shape)
    padded[:rows] = drawn
    return padded


@torch.no_grad()
def initialise(
    named_parameters: Iterable[tuple[str, Tensor]], config: ModelConfig, seed: int
) -> None:
    """Copy initial values, cast to each dtype, into (canonical name, whole parameter) pairs."""
    for name, parameter in named_parameters:
        parameter.copy_(initial_value(name, parameter.shape, config, seed))


def decays(name: str) -> bool:
    """Whether weight decay applies to the parameter of this canonical name.

    Every matrix decays, `wte` and `wpe` among them; biases and LayerNorm gains do not. GPT-1's
    paper decays "all non bias or gain weights", and neither GPT-2's nor GPT-3's takes that back;
    nanoGPT, Megatron-LM and llm.c do the same. (minGPT leaves the embeddings out.) The tied `wte`
    is the output matrix too, so leaving it out would leave the logits' scale free.
    """
    layer = name.split(".")[-2]
    return name.endswith(".weight") and not layer.startswith("ln_")


def _std(name: str, config: ModelConfig) -> float:
    """Standard deviation of a matrix."""
    residual = name.endswith(".c_proj.weight")
    if config.family == "gpt2":
        # N = 2 n_layer residual layers (GPT-2, section 2.3).
        return 0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02
    if config.family == "gpt1":
        return 0.02
    if name.endswith(".attn.c_attn.weight"):
        return 1.0 / math.sqrt(config.d_model)
    if name.endswith(".attn.c_proj.weight"):
        return 1.0 / math.sqrt(config.d_model * config.n_layer)
    return {"wpe.weight": 0.01, "head.weight": 0.0}.get(name, 0.02)


def _normal(shape: tuple[int, ...], std: float, label: str) -> Tensor:
    """Normal draws of one tensor, block after block; blocks may be drawn by several threads."""
    key = int.from_bytes(hashlib.blake2b(label.encode(), digest_size=16).digest(), "little")
    flat = np.empty(math.prod(shape), dtype=np.float32)

    def draw(start: int) -> None:
        # The block's number stands in the highest word of the counter: no two blocks overlap.
        counter = [0, 0, 0, start // BLOCK]
        block = flat[start : start + BLOCK]
        generator = np.random.Generator(np.random.Philox(key=key, counter=counter))
        generator.standard_normal(out=block, dtype=np.float32)
        block *= np.float32(std)

    starts = range(0, flat.size, BLOCK)
    if len(starts) == 1:
        draw(0)
    else:
        with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
            list(pool.map(draw, starts))
    return torch.from_numpy(flat).view(*shape)
