"""tokenizer.json (Hugging Face's format) with a byte-level BPE, read into tiktoken and written.

tiktoken merges two tokens whenever their bytes together are a word, the word of the lowest id
first; Hugging Face merges the pairs of a list, in its order. The two are the same for every text
when ids follow the list and the pair of each word is the one that merges of lower ids leave of its
bytes: a span of text that becomes a word goes through the same merges as the word alone. A file of
which that is not true, or whose pattern is not proven (proof.py), is refused, because its ids would
come out wrong without a word.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megagpt.errors import DamageError, UsageError
from megagpt.files import write_file
from megagpt.tokenizer.gpt2 import (
    BYTES_PATTERN,
    GPT2_PATTERN,
    byte_letters,
    gpt2_merges,
    word_bytes,
)
from megagpt.tokenizer.proof import compare

if TYPE_CHECKING:
    import tiktoken

NEVER = 2**31 - 1
"""A rank above all: an id is stored as int32, and the vocabulary has one more."""


def read_tokenizer_file(path: Path) -> tiktoken.Encoding:
    """The encoding in a tokenizer.json. Raises DamageError when it is not JSON of that form,
    UsageError when tiktoken cannot reproduce it."""
    import tiktoken

    from megagpt.tokenizer import end_of_document

    content = path.read_bytes()
    try:
        data = json.loads(content)
        model = data["model"]
        vocab = {str(word): int(rank) for word, rank in model["vocab"].items()}
        merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
        added = [
            (str(token["content"]), int(token["id"]), bool(token["special"]))
            for token in data["added_tokens"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamageError(
            f"{path}: not a tokenizer.json with a BPE model ({type(error).__name__}: {error}); "
            "make one with data_prep/train_tokenizer.py"
        ) from None
    special = {word: rank for word, rank, _ in added}
    problem = (
        _unsupported(data) or _id_problem(vocab, added) or _merge_problem(vocab, merges, special)
    )
    if problem:
        raise _refusal(path, problem)
    ranks = {word_bytes(word): rank for word, rank in vocab.items() if word not in special}
    for listed, made in zip(merges, merges_of_ranks(ranks), strict=True):
        if listed != made:
            raise _refusal(
                path,
                f"it makes {''.join(made)!r} of {' and '.join(listed)}, which tiktoken would make "
                f"of {' and '.join(made)}",
            )
    name = f"{path.name}-{hashlib.sha256(content).hexdigest()[:12]}"
    try:
        encoding = tiktoken.Encoding(
            name, pat_str=_pattern(data), mergeable_ranks=ranks, special_tokens=special
        )
    except ValueError as error:
        raise _refusal(path, f"its pattern is not one of tiktoken's ({error})") from None
    if problem := compare(content, encoding):
        raise _refusal(path, problem)
    end_of_document(encoding)
    return encoding


def _refusal(path: Path, problem: str) -> UsageError:
    return UsageError(
        f"{path}: {problem}; use a plain byte-level BPE, for example from "
        "data_prep/train_tokenizer.py"
    )


def _id_problem(vocab: dict[str, int], added: list[tuple[str, int, bool]]) -> str | None:
    """Which id is none, or means two things, or comes from text in a way that is not tiktoken's."""
    words: dict[int, str] = {}
    for word, rank in (*vocab.items(), *((word, rank) for word, rank, _ in added)):
        if not 0 <= rank < NEVER:
            return f"its word {word!r} has the id {rank}"
        if words.setdefault(rank, word) != word:
            return f"its words {words[rank]!r} and {word!r} have one id, {rank}"
        if vocab.get(word, rank) != rank:
            return f"its word {word!r} has two ids, {vocab[word]} and {rank}"
    for word, rank, special in added:
        if not special:
            return f"Hugging Face makes its added token {word!r} ({rank}) from text"
    return None


def _unsupported(data: dict[str, Any]) -> str | None:
    """What in the file changes ids in a way that tiktoken has no word for."""
    model = data["model"]
    if model.get("type", "BPE") != "BPE":
        return f"its model is {model['type']}, not BPE"
    if data.get("normalizer"):
        return "it has a normalizer"
    for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            return f"its model sets {key}"
    if model.get("ignore_merges"):
        return "its model sets ignore_merges"
    return None if _pattern(data) else "its pre_tokenizer is not ByteLevel or Split and ByteLevel"


def _pattern(data: dict[str, Any]) -> str:
    """The regular expression of the pre-tokenizer, or nothing when tiktoken has no equal."""
    pre = data.get("pre_tokenizer") or {}
    match pre.get("pretokenizers", []) if pre.get("type") == "Sequence" else [pre]:
        case [*_, {"add_prefix_space": True}]:
            return ""
        case [{"type": "ByteLevel", **options}] if options.get("use_regex", True):
            return GPT2_PATTERN
        case [{"type": "ByteLevel"}] if not data["model"]["merges"]:
            return BYTES_PATTERN  # bytes that nothing merges are ids by themselves
        case [
            {"type": "Split", "behavior": "Isolated", "pattern": {"Regex": str(regex)}, **options},
            {"type": "ByteLevel", "use_regex": False},
        ] if not options.get("invert"):
            return regex
    return ""


def _merge_problem(
    vocab: dict[str, int], merges: list[tuple[str, ...]], special: dict[str, int]
) -> str | None:
    """Why ids do not follow merge order, or None when they do."""
    words = {word: rank for word, rank in vocab.items() if word not in special}
    try:
        known = {word_bytes(word) for word in words}
    except KeyError as error:
        return f"its vocabulary has the character {error} outside the byte alphabet"
    if any(bytes([byte]) not in known for byte in range(256)):
        return "its vocabulary lacks some of the 256 bytes"
    if any(len(merge) != 2 or not words.keys() >= set(merge) for merge in merges):
        return "a merge is not of two words of its vocabulary"
    ranks = [words.get("".join(merge), -1) for merge in merges]
    if -1 in ranks:
        return f"merge {ranks.index(-1) + 1} makes a word that is not in the vocabulary"
    if any(later <= earlier for earlier, later in zip(ranks, ranks[1:], strict=False)):
        return "its ids do not follow the order of its merges"
    made = set(ranks) | {words[letter] for letter in byte_letters().values()}
    if len(made) != len(words):
        return f"{len(words) - len(made)} words of its vocabulary come from no merge"
    return None


def write_tokenizer_file(path: Path, merges: list[tuple[str, str]], special: str) -> None:
    """A tokenizer.json with the 256 bytes, `merges` in order and the one special token."""
    data = tokenizer_json(merges)
    data["added_tokens"] = added_tokens({special: len(data["model"]["vocab"])})
    write_file(path, json.dumps(data, ensure_ascii=False, indent=1))


def added_tokens(special: dict[str, int]) -> list[dict[str, Any]]:
    """The entries of special tokens in a tokenizer.json."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [{"id": id_, "content": text, **flags, "special": True} for text, id_ in special.items()]


def tokenizer_json(merges: list[tuple[str, str]]) -> dict[str, Any]:
    """The object of a tokenizer.json: GPT-2's byte-level BPE with these merges, nothing special.

    Merges are words of the visible alphabet; ids are the bytes in GPT-2's order, then the merges.
    """
    vocab = {letter: rank for rank, letter in enumerate(byte_letters().values())}
    for left, right in merges:
        vocab[left + right] = len(vocab)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "use_regex": True},
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": [f"{a} {b}" for a, b in merges]},
    }


def encoding_merges(encoding: tiktoken.Encoding) -> list[tuple[str, str]] | None:
    """The merges behind an encoding with GPT-2's pattern and id order, or None for any other."""
    if encoding.name == "gpt2":
        return gpt2_merges()
    ranks = encoding._mergeable_ranks
    words = sorted(ranks, key=lambda word: ranks[word])
    if encoding._pat_str != GPT2_PATTERN or [*ranks.values()] != [*range(len(ranks))]:
        return None
    if words[:256] != [bytes([byte]) for byte in byte_letters()]:
        return None
    return merges_of_ranks(ranks)


def merges_of_ranks(ranks: dict[bytes, int]) -> list[tuple[str, str]]:
    """The merges that make the words of more than one byte, in the order of their ranks.

    tiktoken keeps ranks only; the pair that makes a word is what is left of its bytes after all
    merges of a lower rank.
    """
    letters, merges = byte_letters(), []
    for word in sorted((word for word in ranks if len(word) > 1), key=lambda word: ranks[word]):
        parts = [bytes([byte]) for byte in word]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, NEVER) for a, b in zip(parts, parts[1:], strict=False)]
            lowest = pairs.index(min(pairs))
            parts[lowest : lowest + 2] = [parts[lowest] + parts[lowest + 1]]
        left, right = ("".join(letters[byte] for byte in part) for part in parts)
        merges.append((left, right))
    return merges
