"""Texts, or images, that a model in training makes at its evaluations (L3)."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from megagpt.checkpoint.slice_file import fit_rows
from megagpt.config import RunConfig
from megagpt.model import GPT
from megagpt.order.loader import TokenLoader
from megagpt.tokenizer.palette import read_palette
from megagpt.use.generator import Continuation, Generator, write_texts
from megagpt.use.options import TextOptions
from megagpt.use.pictures import gallery, png


def write_samples(
    config: RunConfig,
    weights: Iterable[tuple[str, Tensor | None]],
    loader: TokenLoader,
    device: torch.device | None,
) -> list[str] | bytes:
    """evaluate.samples texts, prompt included, or for Image GPT a PNG of as many images; the same
    draws each time.

    weights: (canonical name, whole fp32 tensor) of the live model, which may be spread over all
    ranks. Every rank goes through them; the one that writes has a device and gets tensors, the
    others get None for both and return []. loader: of the data, whose tokenizer it is, and whose
    first images are completed.
    """
    wanted = config.evaluate
    model = None
    if device is not None:
        with torch.device(device):
            model = GPT(config.model)
    parameters = dict(model.named_parameters()) if model is not None else {}
    for name, whole in weights:
        if whole is not None:
            parameters[name].data.copy_(fit_rows(whole, parameters[name].shape, name))
    if model is None:
        return []
    if config.model.start_token is not None:
        palette = read_palette(loader.tokenizer_name, loader.tokenizer_fingerprint)
        count = min(wanted.samples, loader.n_windows)
        originals = torch.from_numpy(loader.samples(0, count)[:, 1:].astype(np.int64))
        return png(gallery(model.eval(), palette, originals, config.seed))
    generator = Generator(model, loader.encoding, rows=max(1, min(8, wanted.samples)))
    options = TextOptions(max_tokens=wanted.sample_tokens)
    ids = generator.ids(wanted.prompt, options)
    made = write_texts(generator, [Continuation(ids, options, n) for n in range(wanted.samples)])
    return [wanted.prompt + text for text in made]
