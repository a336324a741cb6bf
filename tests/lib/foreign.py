"""GPT-2 of transformers with random weights, and whether ours computes what it does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megagpt.checkpoint import load_model

transformers = pytest.importorskip("transformers")

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 12, "vocab_size": 257}
IDS = torch.randint(257, (2, 12), generator=torch.Generator().manual_seed(3))


def theirs(**more: Any) -> Any:
    """A GPT-2 of transformers with random weights, biases too."""
    torch.manual_seed(5)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES, **more)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    return model


def ours(folder: Path) -> torch.Tensor:
    """Our logits of IDS."""
    with torch.no_grad():
        return load_model(folder)[0].logits(IDS)


def same_logits(folder: Path, model: Any) -> None:
    with torch.no_grad():
        torch.testing.assert_close(ours(folder), model(IDS).logits, rtol=1e-5, atol=2e-6)


def with_config(folder: Path, **keys: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | keys
    (folder / "config.json").write_text(json.dumps(config))
