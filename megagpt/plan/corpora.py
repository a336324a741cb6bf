"""What manifests of prepared corpora say against a run, where they are on this machine (L0).

Read as plain JSON, so that a plan needs neither torch nor the corpora themselves; what is damaged
is left to training and `megagpt data verify`, which name it.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megagpt.config import RunConfig

MANIFEST = "manifest.json"
BY_HASH = "a document belongs to validation when"
"""How the rule of a split begins that is drawn by each document's hash."""


def manifest(path: str) -> dict[str, Any]:
    """The manifest of a prepared corpus as JSON; {} where none can be read."""
    try:
        tree = json.loads((Path(path) / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}


def mismatches(config: RunConfig) -> Iterator[str]:
    """A sentence for each corpus that does not fit the run, or is trained and validated on."""
    window = config.model.n_ctx + 1
    vocabulary = config.model.vocab_size
    for path in _paths(config):
        tree = manifest(path)
        size, tokens = _get(tree, "tokenizer", "vocab_size"), _get(tree, "totals", "tokens")
        if size not in (None, vocabulary):
            yield (
                f"{path}: {size} tokens in its vocabulary, but model.vocab_size = {vocabulary}: "
                f"training will refuse it; set model.vocab_size = {size}, or prepare it with the "
                "model's tokenizer"
            )
        if isinstance(tokens, int) and tokens < window:
            yield (
                f"{path}: {tokens} tokens do not fill one window of n_ctx + 1 = {window}: training "
                "will refuse it; prepare a larger corpus or lower model.n_ctx"
            )
    for shared in overlaps(config):
        yield "; ".join(shared)


def missing(config: RunConfig) -> list[str]:
    """Folders of the run where no corpus is prepared."""
    return [path for path in _paths(config) if not (Path(path) / MANIFEST).is_file()]


def _paths(config: RunConfig) -> list[str]:
    """Folders of all corpora of the run, each once."""
    sources = (*config.data.train, *config.data.validation)
    return list(dict.fromkeys(source.path for source in sources))


def overlaps(config: RunConfig) -> Iterator[tuple[str, str]]:
    """What is wrong and what helps, for each corpus that is trained and validated on."""
    train = {source.path: manifest(source.path) for source in config.data.train}
    for path in dict.fromkeys(source.path for source in config.data.validation):
        held_out = manifest(path)
        for other, trained in train.items():
            same = Path(path).resolve() == Path(other).resolve()
            if why := _overlap(held_out, trained, same):
                yield (
                    f"{path} is validated on, but {why}: the validation loss will not tell what is "
                    "new to the model",
                    "prepare the corpus with --validation-fraction",
                )


def _overlap(held_out: dict[str, Any], trained: dict[str, Any], same: bool) -> str:
    """Why two corpora share documents; "" where nothing says so."""
    if same:
        return "it is trained on too"
    shards = _sums(held_out, "shards") & _sums(trained, "shards")
    if shards:
        return "the training corpus holds the same tokens"
    # A split by hash without a share for validation is the whole of its sources.
    whole = _get(trained, "split", "validation_fraction") == 0.0
    whole = whole and str(_get(trained, "split", "rule")).startswith(BY_HASH)
    sources = _sums(held_out, "sources") & _sums(trained, "sources")
    return (
        "the training corpus was made of the same files, all of them" if whole and sources else ""
    )


def _get(tree: dict[str, Any], table: str, key: str) -> Any:
    found = tree.get(table)
    return found.get(key) if isinstance(found, dict) else None


def _sums(tree: dict[str, Any], key: str) -> set[str]:
    """The checksums of a manifest's shards or sources."""
    rows = tree.get(key)
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return {str(row["sha256"]) for row in rows if row.get("sha256")}
