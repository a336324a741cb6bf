"""Image GPT trains on images, mirrored and moved, as plain torch does, under ZeRO 0 to 3."""

from pathlib import Path

import numpy as np
import pytest

from megagpt.cluster.ranks import Ranks
from megagpt.config import load_run
from megagpt.corpus.records import prepare
from megagpt.tokenizer.palette import Palette
from tests.engine.test_masked import compare, plain_losses, run_layouts
from tests.lib.corpus import run_file
from tests.lib.distributed import group_of_one
from tests.lib.reshape import train

SIDE = 5
PIXELS = SIDE * SIDE
RUN = {
    "model": {"family": "igpt", "n_ctx": PIXELS, "vocab_size": 11},
    # Steps of 4, 8 and 12 images.
    "schedule": {
        "total_tokens": 48 * PIXELS,
        "warmup_tokens": 8 * PIXELS,
        "peak_lr": 1e-3,
        "batch_tokens": 12 * PIXELS,
        "ramp_start_tokens": 4 * PIXELS,
        "ramp_tokens": 16 * PIXELS,
    },
    "optimizer": {"weight_decay": 0.0},
    "checkpoint": {"every_tokens": 0},
    "evaluate": {"every_tokens": 16 * PIXELS, "batches": 5},
    "log": {"tensorboard": False},
}


def images_run(root: Path) -> Path:
    """A run file over corpora of random images, which it flips and moves."""
    draw = np.random.default_rng(0)
    palette = Palette(draw.uniform(-1, 1, (11, 3)).astype(np.float32))
    for split in ("train", "validation"):
        ids = draw.integers(0, 11, (60, PIXELS))
        prepare(root / split, records=ids, vocabulary=palette, split=split)
    file = run_file(root, **RUN)
    text = file.read_text().replace("[data]\n", "[data]\nflip = true\nshift = 1\n")
    file.write_text(text)
    return file


def test_one_process(tmp_path: Path) -> None:
    file = images_run(tmp_path)
    with group_of_one():
        train(file, Ranks(), "", str(tmp_path / "run"), "parallel.micro_batch=2")
    compare(tmp_path / "run", plain_losses(load_run(file)))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_zero_stage_on_two_ranks(tmp_path: Path) -> None:
    file = images_run(tmp_path)
    expected = plain_losses(load_run(file))
    # A pipeline and a tensor split carry GPT-2 and GPT-3 only.
    for run in run_layouts(file, [((2, f"zero{stage}", 1, 1), 2) for stage in range(4)]):
        compare(run, expected)
