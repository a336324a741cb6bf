"""A new run that starts from weights which are there already: `init_from` of a run file (L2).

Weights alone: moments, step, schedule and data order begin anew, under any layout. Names are
strict. What a model may have otherwise is `_fitted` and `_differences`, and it is said.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megagpt.checkpoint.export import Weights, open_weights
from megagpt.checkpoint.slice_file import PADDED, fit_rows
from megagpt.config import ModelConfig, RunConfig
from megagpt.engine import split
from megagpt.engine.engine import Engine
from megagpt.engine.slices import OptimizerState
from megagpt.errors import MegagptError, UsageError
from megagpt.model import initial_value
from megagpt.tokenizer import load_tokenizer

log = logging.getLogger(__name__)


def start_from(config: RunConfig, engine: Engine, tokenizer: tuple[str, str]) -> dict[str, Any]:
    """Fills the engine with the weights at `config.init_from`; all ranks call it together.

    `tokenizer`: name and fingerprint of the training data's, "" where it is not known. Returns
    what run.json keeps: path, sha256, step and tokens. Raises, on every rank, UsageError for
    weights of another model or tokenizer and for none, DamageError for damaged ones.
    """
    weights = _opened(Path(config.init_from), engine)
    _refuse(weights, config.model, tokenizer)
    name, whole = "", torch.empty(0)
    for piece in engine.slices():
        kind, part, parts = piece.split.kind, piece.split.part, piece.split.parts
        if piece.name != name:
            shape = split.whole_shape(piece.shape, kind, parts)
            name, whole = piece.name, _fitted(weights, piece.name, shape, config)
        own = split.take(whole, kind, part, parts).reshape(-1)
        piece.write("fp32", own[piece.start : piece.start + piece.numel])
    # Also makes the weights of the model those of the masters.
    engine.restore(OptimizerState(updates=0, loss_scale={}))
    facts = {"path": str(weights.folder), "sha256": weights.digest}
    return facts | {key: weights.facts[key] for key in ("step", "tokens")}


def check_start(config: RunConfig, tokenizer: tuple[str, str]) -> Weights:
    """The weights at `config.init_from`, unread but for what they say of themselves. Raises
    UsageError where start_from would refuse them."""
    weights = open_weights(Path(config.init_from), compare=False)
    _refuse(weights, config.model, tokenizer)
    return weights


def _opened(path: Path, engine: Engine) -> Weights:
    """The weights, every byte of which the first rank has compared with its checksum."""
    try:
        # A run that still trains there may save meanwhile: all ranks read what the first has read.
        folder = engine.by_first(lambda: open_weights(path).folder)
    except MegagptError as problem:
        raise type(problem)(f"init_from = {str(path)!r}: {problem}") from None
    return open_weights(folder, compare=False)


def _refuse(weights: Weights, model: ModelConfig, tokenizer: tuple[str, str]) -> None:
    """Raises UsageError for weights of another model or tokenizer; says what differs else."""
    old = weights.config.model
    if problems := _differences(old, model):
        raise UsageError(
            f"init_from: {weights.folder} holds the weights of another model (there -> asked):\n"
            + "\n".join(f"  - {problem}" for problem in problems)
            + "\nset these keys of [model] to what they are there"
        )
    same_size = old.vocab_size == model.vocab_size
    if problem := _other_tokenizer(weights, tokenizer, same_size):
        raise UsageError(
            f"init_from: the weights of {weights.folder} were trained with another tokenizer than "
            f"the corpora of data.train, {problem}; prepare the corpora with "
            f"{weights.facts['tokenizer']!r}"
        )
    log.info("starting from %s (step %s)", weights.folder, f"{weights.facts['step']:,}")
    if model.positions < old.positions:
        taken = model.positions, old.positions
        log.info("model.n_ctx: the first %d of %d positions are taken", *taken)
    if model.classes > old.classes:
        log.info("model.classes: the head of %d classes begins at random", model.classes)
    if not same_size:
        added = model.vocab_size - old.vocab_size
        log.info("model.vocab_size: %d rows of the embedding begin at random", added)


def _other_tokenizer(weights: Weights, tokenizer: tuple[str, str], same_size: bool) -> str:
    """Why the ids of the corpora mean something else than those of the weights; "" where they do
    not, as far as is known: a larger tokenizer has every token of the weights' under its id."""
    known, (name, vocabulary) = weights.facts["vocabulary"], tokenizer
    if not known or vocabulary in ("", known):
        return ""
    if same_size:
        return "though as large"
    try:
        old, new = weights.tokenizer(), load_tokenizer(name, vocabulary)
    except MegagptError:  # one of them is not to be had here
        return ""
    tables = ((e._mergeable_ranks.items(), e._special_tokens.items()) for e in (old, new))
    if all(few <= many for few, many in zip(*tables, strict=True)):
        return ""
    return "whose ids mean other text, and not only more of it"


def _differences(old: ModelConfig, new: ModelConfig) -> list[str]:
    """What makes the function another or the weights unfit, as "key: there -> asked".

    dropout, vocab_multiple and lm_weight may differ, n_ctx may be shorter, a classifier may be new,
    and vocab_size larger but for Image GPT, whose start vector stands behind the vocabulary.
    """
    keys = ["family", "n_layer", "n_head", "d_model"]
    keys += ["activation"] if new.family != "igpt" else ["vocab_size"]
    keys += ["vocab_size"] if new.vocab_size < old.vocab_size else []
    keys += ["n_ctx"] if new.positions > old.positions else []
    keys += ["classes", "parts"] if old.classes else []
    found = [key for key in keys if getattr(old, key) != getattr(new, key)]
    if old.n_layer == new.n_layer:
        bands = [[model.band(i) for i in range(new.n_layer)] for model in (old, new)]
        keys = ["attention", "band_width"] if bands[0] != bands[1] else []
        found += [key for key in keys if getattr(old, key) != getattr(new, key)]
    return [f"model.{key}: {getattr(old, key)!r} -> {getattr(new, key)!r}" for key in found]


def _fitted(weights: Weights, name: str, shape: tuple[int, ...], config: RunConfig) -> Tensor:
    """A parameter in the shape of this run's model: positions cut, tokens added, padding added."""
    if name.startswith("classifier.") and not weights.config.model.classes:
        return initial_value(name, shape, config.model, config.seed)
    whole = weights.read(name)
    if name == "wpe.weight":
        whole = whole[: config.model.positions]
    if name in PADDED:
        models = (weights.config.model, config.model)
        old, new = (m.n_embedding if name == "wte.weight" else m.vocab_size for m in models)
        whole = whole[:old]
        if new > old:
            drawn = initial_value(name, shape, config.model, config.seed)
            whole = torch.cat([whole, drawn[old:new]])
    return fit_rows(whole, shape, name)
