"""The two vocabularies that need no network: GPT-2's merges and plain bytes."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from megagpt.errors import DamageError

if TYPE_CHECKING:
    import tiktoken

GPT2_MERGES = Path(__file__).with_name("gpt2_vocab.bpe")
GPT2_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
"""The hash that tiktoken expects of the same file."""

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
"""GPT-2's pre-tokenization: contractions, letters, numbers, the rest, white space (Radford et al.
2019, encoder.py). Possessive quantifiers change the speed, not the matches."""

BYTES_PATTERN = r"(?s:.)"


def byte_order() -> list[int]:
    """The 256 bytes in the order of GPT-2's first ids: the printable ones of Latin-1 first."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return printable + [byte for byte in range(256) if byte not in set(printable)]


@cache
def byte_letters() -> dict[int, str]:
    """byte -> the visible character that stands for it in byte-level BPE files."""
    order = byte_order()
    return {
        byte: chr(byte) if place < 188 else chr(256 + place - 188)
        for place, byte in enumerate(order)
    }


@cache
def letter_bytes() -> dict[str, int]:
    """The inverse of `byte_letters`."""
    return {letter: byte for byte, letter in byte_letters().items()}


def word_bytes(word: str) -> bytes:
    """The bytes of a word in the visible alphabet. Raises KeyError outside the alphabet."""
    table = letter_bytes()
    return bytes([table[letter] for letter in word])


def gpt2_merges() -> list[tuple[str, str]]:
    """GPT-2's 50,000 merges in order, in the visible alphabet. Raises DamageError."""
    content = GPT2_MERGES.read_bytes()
    if hashlib.sha256(content).hexdigest() != GPT2_SHA256:
        raise DamageError(
            f"{GPT2_MERGES}: sha256 is not {GPT2_SHA256}; the file is damaged, install megagpt "
            "again"
        )
    merges = []
    for line in content.decode().splitlines()[1:]:
        left, right = line.split(" ")
        merges.append((left, right))
    return merges


@cache
def gpt2_encoding() -> tiktoken.Encoding:
    """GPT-2's encoding from the packaged merge list (about 0.1 s, no network)."""
    import tiktoken

    from megagpt.tokenizer import END_OF_DOCUMENT

    # Ids are the 256 bytes in GPT-2's order, then the merges in file order: equal to encoder.json.
    ranks = {bytes([byte]): rank for rank, byte in enumerate(byte_order())}
    for left, right in gpt2_merges():
        ranks[word_bytes(left) + word_bytes(right)] = len(ranks)
    assert len(ranks) == 50256
    return tiktoken.Encoding(
        "gpt2",
        pat_str=GPT2_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={END_OF_DOCUMENT: len(ranks)},
    )


@cache
def bytes_encoding() -> tiktoken.Encoding:
    """Every byte is its own id; END-OF-DOCUMENT is 256."""
    import tiktoken

    from megagpt.tokenizer import END_OF_DOCUMENT

    return tiktoken.Encoding(
        "bytes",
        pat_str=BYTES_PATTERN,
        mergeable_ranks={bytes([byte]): byte for byte in range(256)},
        special_tokens={END_OF_DOCUMENT: 256},
    )
