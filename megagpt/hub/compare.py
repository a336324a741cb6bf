"""Whether transformers computes from an export what the weights compute here (L3).

Ours is computed layer by layer, so that no more than one layer is in memory, and in one pass: a
continuation is greedy when each of its tokens is the likeliest after those before it.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import torch
from torch import Tensor, nn

from megagpt.checkpoint.export import Weights, filled
from megagpt.errors import MegagptError
from megagpt.model import Layer, head_logits, layers
from megagpt.tokenizer.palette import Palette

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}
"""Dtype of the exported weights -> largest difference of two logits, as a share of the largest."""
POSITIONS = 64
"""Positions of each window whose logits are compared, the first and the last among them."""
CONTINUED = 32
"""Tokens that the greedy continuation adds, up to the full context."""
TEXTS = (
    "Hello world",
    " It's 12,345 tests\n\n\n  x, we'LL don't",
    "\u65e5\u672c\u8a9e \u00fcn\u00efcode \U0001f916\U0001f916 a\u00a0b",
    "tab\t\tand   spaces   ",
    "1234567890" * 3,
    "a<|endoftext|>b",
)
"""Texts whose ids are compared."""


IMAGES = 2
"""Images whose ids are compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """How an export differs from the weights that it was made of."""

    difference: float
    """Largest absolute difference of two logits."""
    largest: float
    """Largest absolute logit."""
    tokens: int
    """Tokens of the greedy continuation."""
    other_tokens: int
    """Those that are not our likeliest, nor as likely within the tolerance."""
    texts: int
    """Texts, or images, whose ids are compared."""
    other_texts: int
    """Those that AutoTokenizer, or AutoImageProcessor, encodes to other ids."""
    tolerance: float
    """For `difference`."""

    def problem(self) -> str:
        """Why the export does not count; "" when it does."""
        if not self.difference <= self.tolerance:
            return (
                f"logits differ by {self.difference:.3g} (the largest is {self.largest:.3g}), "
                f"more than {self.tolerance:.3g}"
            )
        if self.other_tokens:
            return f"{self.other_tokens} of {self.tokens} greedy tokens are others"
        if self.other_texts:
            return f"its tokenizer files give other ids for {self.other_texts} of {self.texts}"
        return ""


def compare(
    folder: Path,
    weights: Weights,
    windows: Tensor,
    encoding: tiktoken.Encoding | Palette | None,
    dtype: torch.dtype,
) -> Comparison:
    """Asks transformers about the export in `folder`. windows: ids (B, n_ctx) of full contexts.

    Raises MegagptError when transformers cannot open it.
    """
    n_ctx = windows.shape[1]
    asked: dict[str, list[Any]] = {"texts": [], "images": []}
    ids: list[list[int]] = []
    if isinstance(encoding, Palette):
        # Images of the palette's own colours, for two that are as near round to either.
        drawn = np.random.default_rng(0).integers(0, encoding.size, (IMAGES, n_ctx))
        images = encoding.decode(drawn)
        asked["images"], ids = images.tolist(), encoding.encode(images).tolist()
    elif encoding is not None:
        asked["texts"] = list(TEXTS)
        ids = [encoding.encode_ordinary(text) for text in TEXTS]
    positions = torch.linspace(0, n_ctx - 1, min(POSITIONS, n_ctx)).long()
    begin = n_ctx - min(CONTINUED, n_ctx // 2)
    questions = {
        "windows": windows.tolist(),
        "prompts": windows[:1, :begin].tolist(),
        "positions": positions.tolist(),
    }
    answers = _ask(folder, asked | questions)
    greedy = answers["greedy"]
    continued = torch.arange(begin - 1, n_ctx - 1)
    picked = [positions] * len(windows) + [continued] * len(greedy)
    ours = logits_at(weights, torch.cat([windows, greedy]), picked)
    theirs = answers["logits"]
    largest = max(float(one.abs().max()) for one in ours)
    tolerance = TOLERANCE[dtype] * largest
    expected = torch.stack(ours[: len(windows)])
    chosen = ours[-1].gather(1, greedy[0, begin:, None])[:, 0]  # (tokens,)
    # Two tokens that rounding may swap are as likely as each other.
    behind = ours[-1].max(1).values - chosen > tolerance
    return Comparison(
        difference=float((theirs - expected).abs().max()),
        largest=largest,
        tokens=len(behind),
        # Weights that are rounded more coarsely may choose otherwise.
        other_tokens=int(behind.sum()) if dtype == torch.float32 else 0,
        texts=len(ids),
        other_texts=sum(a != b for a, b in zip(ids, answers["texts"], strict=True)),
        tolerance=tolerance,
    )


def _ask(folder: Path, questions: Mapping[str, object]) -> dict[str, Tensor]:
    """What answers.py finds, in a process of its own."""
    with tempfile.TemporaryDirectory() as place:
        asked, answered = Path(place, "questions.json"), Path(place, "answers.pt")
        asked.write_text(json.dumps(questions))
        command = [sys.executable, "-m", "megagpt.hub.answers"]
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        done = subprocess.run(
            [*command, *map(str, (folder, asked, answered))],
            env=os.environ | offline,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
            raise MegagptError(f"{folder}: transformers cannot open the export ({last})")
        return dict(torch.load(answered, weights_only=True))


@torch.no_grad()
def logits_at(
    weights: Weights, ids: Tensor, positions: Sequence[Tensor], dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Logits of ids (B, T) at the positions of each row: B tensors (positions, V)."""
    *chain, head = layers(replace(weights.config.model, vocab_multiple=1))

    def loaded(layer: Layer) -> nn.Module:
        """One layer of the list with its weights."""
        with torch.device("meta"):
            module = layer.cls(**layer.kwargs).to(dtype)
        stem = layer.tied_to or layer.name
        return filled(module, "cpu", lambda name, shape: weights.whole(f"{stem}.{name}", shape))

    hidden = ids
    for layer in chain:
        hidden = loaded(layer)(hidden)
    last = loaded(head)
    return [head_logits(last, row[at]) for row, at in zip(hidden, positions, strict=True)]
