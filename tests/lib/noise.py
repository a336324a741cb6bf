"""Runs that spike: a learning rate that is too high, and samples of random letters now and then."""

import json
import random
from pathlib import Path

from tests.lib.corpus import write_corpus

SPIKES = {"spike_action": "rollback", "spike_window": 8, "spike_threshold": 4.0}
SKIPS = SPIKES | {"spike_action": "skip"}
FAST = {"peak_lr": 0.03, "total_tokens": 20_000}


def journal(run: Path) -> list[dict[str, object]]:
    """The entries of a run's journal."""
    return [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]


def with_noise(file: Path) -> Path:
    """The run file with a second source, of which every hundredth sample is: random letters."""
    draw = random.Random(5)
    texts = ["".join(chr(draw.randrange(128)) for _ in range(200)) for _ in range(60)]
    write_corpus(file.parent / "noise", texts)
    train, noise = file.parent / "train", file.parent / "noise"
    sources = f'{{ path = "{train}", weight = 99 }}, {{ path = "{noise}", weight = 1 }}'
    text = file.read_text().replace(f'train = [{{ path = "{train}" }}]', f"train = [{sources}]")
    assert "weight" in text
    file.write_text(text)
    return file
