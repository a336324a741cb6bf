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

BYTES_PATTERN = r"(?s:.)"
"""Every character alone."""

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
"""GPT-2's pre-tokenization: contractions, letters, numbers, the rest, white space (Radford et al.
2019, encoder.py). Possessive quantifiers change the speed, not the matches."""


def byte_order() -> list[int]:
    """The 256 bytes in the order of GPT-2's first ids: the printable ones of Latin-1 first."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return printable + [byte for byte in range(256) if byte not in set(printable)]


@cache
def byte_letters() -> dict[int, str]:
    """byte -> the visible character that stands for it in byte-level BPE files."""
    # The 188 printable bytes stand for themselves, the others for U+0100 onwards.
    order = enumerate(byte_order())
    return {byte: chr(byte if rank < 188 else 256 + rank - 188) for rank, byte in order}


@cache
def _letter_bytes() -> dict[str, int]:
    return {letter: byte for byte, letter in byte_letters().items()}


def word_bytes(word: str) -> bytes:
    """The bytes of a word in the visible alphabet. Raises KeyError outside the alphabet."""
    table = _letter_bytes()
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
    # Ids are the 256 bytes in GPT-2's order, then the merges in file order: equal to encoder.json.
    words = [bytes([byte]) for byte in byte_order()]
    words += [word_bytes(left) + word_bytes(right) for left, right in gpt2_merges()]
    assert len(words) == 50256
    return _encoding("gpt2", GPT2_PATTERN, words)


@cache
def bytes_encoding() -> tiktoken.Encoding:
    """Every byte is its own id; END-OF-DOCUMENT is 256."""
    return _encoding("bytes", BYTES_PATTERN, [bytes([byte]) for byte in range(256)])


def _encoding(name: str, pattern: str, words: list[bytes]) -> tiktoken.Encoding:
    """The words in the order of their ids, and END-OF-DOCUMENT after them."""
    import tiktoken

    from megagpt.tokenizer import END_OF_DOCUMENT

    ranks = {word: rank for rank, word in enumerate(words)}
    special = {END_OF_DOCUMENT: len(words)}
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
