"""Images of a model: drawn with the cache as without, completed, told apart by layer, laid out."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from megagpt.config.presets import ModelConfig
from megagpt.errors import MegagptError, UsageError
from megagpt.model import GPT
from megagpt.tokenizer.palette import Palette
from megagpt.use.pictures import completions, features, gallery, grid, half, paint, png
from megagpt.use.sampling import uniform
from tests.lib.weights import random_model, random_value

COLOURS = 7
PALETTE = Palette(np.random.default_rng(0).uniform(-1, 1, (COLOURS, 3)).astype(np.float32))
IMAGES = torch.randint(COLOURS, (3, 16), generator=torch.Generator().manual_seed(0))


def drawn_model(**sizes: int) -> GPT:
    """With weights of some size; a GPT is made of memory as it lies there."""
    config = ModelConfig(family="igpt", vocab_size=COLOURS, **sizes)
    made, draw = GPT(config), torch.Generator().manual_seed(1)
    for name, parameter in made.named_parameters():
        parameter.data.copy_(3 * random_value(name, parameter.shape, draw))
    return made.eval()


@pytest.fixture(scope="module")
def model() -> GPT:
    return drawn_model(n_layer=3, n_head=2, d_model=16, n_ctx=16)


@torch.no_grad()
def test_images_are_drawn_as_without_a_cache(model: GPT) -> None:
    drawn = paint(model, IMAGES[:, :5], seed=3)
    assert torch.equal(drawn[:, :5], IMAGES[:, :5])
    assert not torch.equal(drawn, paint(model, IMAGES[:, :5], seed=4))
    for number, image in enumerate(IMAGES):
        made = torch.cat([torch.tensor([COLOURS]), image[:5]])
        for position in range(5, 16):
            chances = model.logits(made[None])[0, -1].double().softmax(0)
            at = uniform(3, number, position)
            made = torch.cat([made, (chances.cumsum(0) <= at).sum()[None]])
        assert torch.equal(drawn[number], made[1:])
    assert paint(model, IMAGES[:, :0], seed=3).shape == (3, 16)
    with pytest.raises(UsageError, match='model.family = "gpt2": only Image GPT draws images'):
        paint(random_model(16), IMAGES[:, :5], seed=3)
    broken = drawn_model(n_layer=1, n_head=1, d_model=4, n_ctx=9)
    broken.ln_f.weight.data[0] = torch.nan
    with pytest.raises(MegagptError, match="numbers for the next pixel are none"):
        paint(broken, IMAGES[:, :5], seed=3)


def test_a_completion_begins_with_the_upper_half(model: GPT) -> None:
    continued = completions(model, IMAGES, seed=3, samples=2)
    assert continued.shape == (2, 3, 16)
    assert torch.equal(continued[..., :8], IMAGES[None, :, :8].repeat(2, 1, 1))
    assert not torch.equal(continued[0], continued[1])


def test_nothing_is_given_below_what_is_shown() -> None:
    model, images = drawn_model(n_layer=1, n_head=1, d_model=4, n_ctx=9), IMAGES[:, :9]
    continued = completions(model, images, seed=3, samples=20)
    assert (continued[..., :3] == images[:, :3]).all()
    assert (half(PALETTE.decode(images.numpy()))[:, 1:] == 255).all()
    assert not (continued[..., 3] == images[:, 3]).all(), "of an odd side the middle row is drawn"


@torch.no_grad()
def test_features_are_what_each_layer_reads(model: GPT) -> None:
    seen: list[torch.Tensor] = []
    norms = [*(block.ln_1 for block in model.h), model.ln_f]
    hooks = [n.register_forward_hook(lambda _, __, out: seen.append(out.mean(1))) for n in norms]
    read = torch.cat([torch.full((3, 1), COLOURS), IMAGES[:, :-1]], 1)
    model.logits(read)
    for hook in hooks:
        hook.remove()
    for found, expected in zip(features(model, IMAGES, batch=2), seen, strict=True):
        torch.testing.assert_close(found, expected)


def test_a_grid_shows_every_pixel(model: GPT) -> None:
    pictures = PALETTE.decode(IMAGES.numpy())
    sheet = grid(np.stack([pictures, half(pictures)]), scale=3, gap=1)
    assert sheet.shape == ((2 * 5 + 1) * 3, (3 * 5 + 1) * 3, 3)
    cell = sheet[::3, ::3]
    for column in range(3):
        place = cell[1:5, 1 + 5 * column : 5 + 5 * column]
        assert np.array_equal(place, pictures[column])
        below = cell[6:10, 1 + 5 * column : 5 + 5 * column]
        assert np.array_equal(below[:2], pictures[column, :2]) and (below[2:] == 255).all()
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png(sheet)))), sheet)
    made = gallery(model, PALETTE, IMAGES, seed=1)
    assert made.shape == ((4 * 5 + 1) * 8, (3 * 5 + 1) * 8, 3)
