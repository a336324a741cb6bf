"""The model family: what a GPT computes (L1: torch; knows no rank, group, engine or path)."""

from megagpt.model.cache import Cache
from megagpt.model.gpt import GPT, Layer, LayerClasses, layers
from megagpt.model.initialise import decays, initial_value, initialise
from megagpt.model.kernels.loss import head_logits, head_loss

__all__ = [
    "GPT",
    "Cache",
    "Layer",
    "LayerClasses",
    "decays",
    "head_logits",
    "head_loss",
    "initial_value",
    "initialise",
    "layers",
]
