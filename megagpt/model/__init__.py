"""The model family: what a GPT computes (L1: torch; knows no rank, group, engine or path)."""

from megagpt.model.gpt import GPT, Cache
from megagpt.model.initialise import decays, initial_value, initialise
from megagpt.model.kernels.loss import head_logits, head_loss
from megagpt.model.layers import Layer, Parts, layers

__all__ = [
    "GPT",
    "Cache",
    "Layer",
    "Parts",
    "decays",
    "head_logits",
    "head_loss",
    "initial_value",
    "initialise",
    "layers",
]
