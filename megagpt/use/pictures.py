"""Images of a trained Image GPT: drawn, continued, laid out in a grid, told apart (L3).

Letters: B images, P pixels that are given, K colours, S pixels a side, D width of the model.
"""

import io

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megagpt.errors import MegagptError, UsageError
from megagpt.model import GPT
from megagpt.tokenizer.palette import Palette
from megagpt.use.options import TextOptions
from megagpt.use.sampling import sample

SCALE, GAP = 8, 1
"""A pixel's side in a grid, and the pixels of an image between two images."""
PAPER = 255
"""Between images, and where pixels are not known: white."""


@torch.no_grad()
def paint(model: GPT, given: Tensor, seed: int, temperature: float = 1.0) -> Tensor:
    """Whole images (B, n_ctx) that begin with the pixels `given` (B, P), P of 0 or more.

    Drawn from all colours, as in the paper: no top-k, no top-p. A draw is decided by seed, number
    of the image and position. Raises UsageError for a model of another family, MegagptError for one
    that gives no numbers.
    """
    start, n_ctx = model.config.start_token, model.config.n_ctx
    if start is None:
        raise UsageError(f'model.family = "{model.config.family}": only Image GPT draws images')
    options = TextOptions(temperature=temperature, seed=seed)
    device, cache = next(model.parameters()).device, model.new_cache(len(given))
    made = torch.cat([torch.full((len(given), 1), start), given.long().cpu()], 1)
    unread = made
    for position in range(given.shape[1], n_ctx):
        hidden = model.read(unread.to(device), cache)[:, -1]
        logits = model.scores(hidden).float().cpu()
        if not logits.isfinite().all():
            raise MegagptError("the model's numbers for the next pixel are none")
        drawn = [sample(row, options, b, position) for b, row in enumerate(logits)]
        unread = torch.tensor(drawn)[:, None]
        made = torch.cat([made, unread], 1)
    return made[:, 1:]


def completions(model: GPT, images: Tensor, seed: int, samples: int = 1) -> Tensor:
    """The rows above the middle of each image (B, n_ctx), continued `samples` times: (samples, B,
    n_ctx)."""
    side = int(images.shape[1] ** 0.5)
    given = images[:, : side // 2 * side].repeat(samples, 1)
    return paint(model, given, seed).view(samples, *images.shape)


@torch.no_grad()
def features(model: GPT, images: Tensor, batch: int = 256) -> list[Tensor]:
    """What each layer knows of images (B, n_ctx), for a linear probe: n_layer + 1 of (B, D) fp32 on
    the model's device.

    Entry l is what block l reads, ln_1(h^l), and the last what the head reads, ln_f(h^L), each the
    mean over the positions (Chen et al. 2020, section 2.4). Position p has read the start vector
    and the pixels before p.
    """
    model, parts = model.eval(), []
    device = next(model.parameters()).device
    for some in images.to(device).split(batch):
        start = torch.full((len(some), 1), model.config.n_embedding - 1, device=device)
        hidden = model.wpe(model.wte(torch.cat([start, some[:, :-1]], 1)))
        means = []
        for block in model.h:
            means.append(block.get_submodule("ln_1")(hidden).mean(1).float())  # (B, T, D) -> (B, D)
            hidden = block(hidden)
        parts.append([*means, model.ln_f(hidden).mean(1).float()])
    return [torch.cat(layer) for layer in zip(*parts, strict=True)]


def half(pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Images (B, S, S, 3) without their lower half."""
    shown = pictures.copy()
    shown[:, pictures.shape[1] // 2 :] = PAPER
    return shown


def grid(rows: NDArray[np.uint8], scale: int = SCALE, gap: int = GAP) -> NDArray[np.uint8]:
    """Rows of images (R, C, S, S, 3) as one picture: each pixel `scale` wide, `gap` pixels between.
    Nothing is smoothed: (R * (S + gap) * scale + gap * scale, ..., 3)."""
    cells = np.pad(rows, ((0, 0), (0, 0), (0, gap), (0, gap), (0, 0)), constant_values=PAPER)
    r, c, cell, _, _ = cells.shape
    sheet = cells.swapaxes(1, 2).reshape(r * cell, c * cell, 3)
    sheet = np.pad(sheet, ((gap, 0), (gap, 0), (0, 0)), constant_values=PAPER)
    return sheet.repeat(scale, 0).repeat(scale, 1)


def png(picture: NDArray[np.uint8]) -> bytes:
    """A picture (H, W, 3) as a PNG file."""
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(picture).save(content, "PNG", optimize=True)
    return content.getvalue()


def gallery(model: GPT, palette: Palette, originals: Tensor, seed: int) -> NDArray[np.uint8]:
    """A grid of as many columns as there are originals (B, n_ctx): images of the model's own, the
    originals, their upper halves, and what the model makes of these."""
    own = paint(model, originals[:, :0], seed)
    continued = completions(model, originals, seed)[0]
    free, whole, done = (palette.decode(x.numpy()) for x in (own, originals, continued))
    return grid(np.stack([free, whole, half(whole), done]))
