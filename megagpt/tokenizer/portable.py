"""A vocabulary as one file that goes with what was trained on it: tokenizer.json (L1).

The name or path of a tokenizer says where it was. Weights go elsewhere and outlive the corpus that
they were trained on, so they take the vocabulary itself with them, in the format that Hugging
Face's tokenizers read too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from megagpt.tokenizer import load_tokenizer
from megagpt.tokenizer.gpt2 import GPT2_PATTERN, byte_letters, gpt2_merges
from megagpt.tokenizer.json import added_tokens, merges_of_ranks, tokenizer_json
from megagpt.tokenizer.palette import holds_palette, read_palette

if TYPE_CHECKING:
    import tiktoken

FILE = "tokenizer.json"
"""Its name wherever it goes."""


def tokenizer_content(name: str, expected: str = "") -> bytes:
    """The tokenizer.json of what `load_tokenizer` takes, or of a palette: the file itself, or one
    that gives the same ids as the vocabulary of that name.

    `expected` is the vocabulary's fingerprint, "" where it is not known. Raises what
    `load_tokenizer` raises.
    """
    path = Path(name) / FILE if Path(name).is_dir() else Path(name)
    if holds_palette(path):
        read_palette(path, expected)
        return path.read_bytes()
    encoding = load_tokenizer(name, expected)
    if encoding.name not in ("gpt2", "bytes") and path.is_file():
        return path.read_bytes()
    return described(encoding).encode()


def described(encoding: tiktoken.Encoding) -> str:
    """A tokenizer.json that reads back as an encoding of the same fingerprint."""
    ranks, letters = encoding._mergeable_ranks, byte_letters()
    # GPT-2's merges are known; those of another vocabulary of its size take seconds to find.
    data = tokenizer_json(gpt2_merges() if encoding.name == "gpt2" else merges_of_ranks(ranks))
    words = {"".join(letters[byte] for byte in word): rank for word, rank in ranks.items()}
    # Special tokens in both places: Hugging Face gives those that are no words ids of its own.
    data["model"]["vocab"] = words | encoding._special_tokens
    data["added_tokens"] = added_tokens(encoding._special_tokens)
    if encoding._pat_str != GPT2_PATTERN:
        plain = data["pre_tokenizer"] | {"use_regex": False}
        cut = {"type": "Split", "pattern": {"Regex": encoding._pat_str}, "behavior": "Isolated"}
        parts = [cut | {"invert": False}, plain]
        # Without a merge no pattern changes the ids, and `bytes` has one that is only tiktoken's.
        several = bool(data["model"]["merges"])
        data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts} if several else plain
    return json.dumps(data, ensure_ascii=False)
