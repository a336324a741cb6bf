"""The palette of an Image GPT on either side (L3).

transformers keeps it as `clusters` of the image processor's preprocessor_config.json, OpenAI as
kmeans_centers.npy; both are the same numbers in [-1, 1] as ours.
"""

import json
import logging
from math import isqrt
from pathlib import Path

import numpy as np

from megagpt.config.presets import ModelConfig
from megagpt.errors import DamageError, UsageError
from megagpt.files import write_file
from megagpt.tokenizer.palette import Palette, read_palette

log = logging.getLogger(__name__)

PROCESSOR = "preprocessor_config.json"
CENTRES = "kmeans_centers.npy"


def write_processor(folder: Path, palette: Palette, n_ctx: int) -> None:
    """What AutoImageProcessor makes the palette's ids of an image with: it is resized to n_ctx
    pixels, x / 127.5 - 1 is taken of each byte x, and the nearest colour's number."""
    side = isqrt(n_ctx)
    tree = {
        "image_processor_type": "ImageGPTImageProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 2,
        "do_normalize": True,
        "do_color_quantize": True,
        "clusters": json.loads(palette.text)["colours"],
    }
    write_file(folder / PROCESSOR, json.dumps(tree, indent=1) + "\n")


def palette_beside(path: Path, config: ModelConfig, name: str | None) -> Palette | None:
    """The palette that is named (a file), or that lies beside an Image GPT's weights; None, said,
    where there is none. Raises UsageError for one of another size than the model's vocabulary,
    DamageError for one that cannot be read."""
    folder = path if path.is_dir() else path.parent
    if name:
        file, palette = Path(name), read_palette(name)
    elif (file := folder / PROCESSOR).is_file():
        palette = _clusters(file)
    elif (file := folder / CENTRES).is_file():
        palette = read_palette(file)
    else:
        log.warning(
            "%s: comes without a palette (%s or %s), so these weights cannot draw in colours; name "
            "one with --tokenizer",
            path,
            PROCESSOR,
            CENTRES,
        )
        return None
    if palette.size != config.vocab_size:
        raise UsageError(
            f"{file}: a palette of {palette.size} colours, but the model has {config.vocab_size}; "
            "name another with --tokenizer"
        )
    return palette


def _clusters(path: Path) -> Palette:
    try:
        clusters = json.loads(path.read_text(encoding="utf-8"))["clusters"]
        return Palette(np.array(clusters, np.float32))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamageError(
            f"{path}: holds no clusters of colours ({type(error).__name__}: {error}); copy it again"
        ) from None
