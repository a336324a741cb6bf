"""Data sets of Hugging Face, from the hub or a local folder, as documents.

`hf:NAME[/CONFIG][:SPLIT]`: NAME is `owner/name`, an old name without owner, or the path of a
local folder (starting with `.`, `/` or `~`); SPLIT is `train` unless given. Hub data is streamed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megagpt.corpus.documents import Documents
from megagpt.errors import MegagptError, UsageError


def as_input(text: str, text_field: str) -> str | Documents:
    """What an argument of a command line means: `hf:` opens a data set."""
    return hub_documents(text, text_field) if text.startswith("hf:") else text


def hub_documents(address: str, text_field: str) -> Documents:
    """The documents behind an `hf:` address. Raises UsageError when it cannot be opened."""
    name, config, split = parse_address(address)
    data = open_dataset(name, config, split)
    columns = getattr(data, "column_names", None)
    if columns and text_field not in columns:
        raise UsageError(
            f"{address}: no column {text_field!r}; its columns are {', '.join(columns)}: choose "
            "one with --text-field"
        )

    def texts() -> Iterator[Any]:
        try:
            for row in data:
                yield row.get(text_field)
        except Exception as error:  # as in open_dataset
            reason = str(error).split("\n")[0] or type(error).__name__
            raise MegagptError(
                f"{address}: broke off ({reason}); run the same command again, it continues where "
                "it stopped"
            ) from None

    return Documents(address, texts)


def parse_address(address: str) -> tuple[str, str | None, str]:
    """(name, config, split) of `hf:NAME[/CONFIG][:SPLIT]`. Raises UsageError."""
    name, _, split = address.removeprefix("hf:").partition(":")
    parts = name.split("/")
    if name[:1] in ("/", ".", "~"):
        return str(Path(name).expanduser()), None, split or "train"
    if not all(parts) or len(parts) > 3:
        raise UsageError(f"{address}: must be hf:NAME[/CONFIG][:SPLIT], as hf:owner/name:train")
    config = parts[2] if len(parts) == 3 else None
    return "/".join(parts[:2]), config, split or "train"


def open_dataset(name: str, config: str | None, split: str) -> Any:
    """A streamed data set, or a local one that `save_to_disk` wrote. Raises UsageError."""
    # An import of two seconds, for this path only.
    import datasets

    try:
        folder = Path(name)
        if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
            data = datasets.load_from_disk(name)
            return data[split] if isinstance(data, datasets.DatasetDict) else data
        if folder.is_dir() or not os.environ.get("HF_HUB_OFFLINE"):
            return datasets.load_dataset(name, config, split=split, streaming=True)
        raise ConnectionError("HF_HUB_OFFLINE is set")
    except Exception as error:  # datasets raises a dozen kinds, from KeyError to its own
        reason = str(error).split("\n")[0] or type(error).__name__
        raise UsageError(
            f"data set {name}, config {config}, split {split}: cannot be opened ({reason}); check "
            "the name and the network, or give downloaded files instead"
        ) from None
