"""Models and folders of weights of any shape with random parameters."""

from functools import partial
from pathlib import Path

import torch

from megagpt.checkpoint.export import write_weights
from megagpt.checkpoint.weights import PlannedTensor
from megagpt.config.presets import ModelConfig
from megagpt.hub.importing import placeholder_run
from megagpt.hub.naming import shapes_of
from megagpt.model import GPT


def banded(**sizes: int) -> ModelConfig:
    """A small model with both kinds of layers in turns; `sizes` in place of its own."""
    own = {"n_layer": 2, "n_head": 2, "d_model": 32, "vocab_size": 257}
    return ModelConfig(**own | sizes, attention=("dense", "banded"))


def random_model(n_ctx: int, vocab_size: int = 257) -> GPT:
    """Weights so large that every position and every token counts."""
    config = ModelConfig(n_layer=2, n_head=2, d_model=16, n_ctx=n_ctx, vocab_size=vocab_size)
    model = GPT(config)
    draw = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3, generator=draw)
    return model.eval()


def random_value(
    name: str, shape: tuple[int, ...], draw: torch.Generator, std: float = 0.1
) -> torch.Tensor:
    """Every tensor random, biases too; one gain negative, one near 0. std: of matrices."""
    value = torch.empty(shape).normal_(0, 3 * std if name.endswith("bias") else std, generator=draw)
    if ".ln_" in name and name.endswith("weight") or name == "ln_f.weight":
        value = 1 + 0.3 * value / std
        value[0], value[1] = -value[0], 1e-4
    return value


def weights_folder(
    folder: Path,
    config: ModelConfig,
    tokenizer: str = "",
    seed: int = 1,
    vocabulary: str = "",
    std: float = 0.1,
) -> dict[str, torch.Tensor]:
    """Writes the folder; its parameters by canonical name."""
    draw, shapes = torch.Generator().manual_seed(seed), shapes_of(config)
    values = {name: random_value(name, shape, draw, std) for name, shape in shapes.items()}
    planned = [
        PlannedTensor(name, tuple(value.shape), partial(lambda v: v, value))
        for name, value in values.items()
    ]
    folder.mkdir(parents=True)
    facts = {"step": 0, "tokens": 0, "tokenizer": tokenizer, "vocabulary": vocabulary}
    write_weights(folder, planned, placeholder_run(config), facts, 100_000)
    return values
