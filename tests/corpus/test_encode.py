"""Long texts get tiktoken's ids wherever they are cut, and a fast encoder that is wrong is left."""

import random
import re

import numpy as np
import pytest
import tiktoken

from megagpt.corpus import part as part_module
from megagpt.corpus.part import Encoded, Text, encode
from megagpt.errors import DamageError, UsageError
from megagpt.tokenizer import encoder as encoder_module
from megagpt.tokenizer import load_tokenizer
from megagpt.tokenizer.encoder import Encoder, pieces

LONG = {
    "spaces": " " * 2_000_000 + "x",
    "newlines": "x" + "\n" * 1_200_000 + "y",
    "mixed": "a \n\t" * 300_000,
    "letters": "a" * 1_000_000,
    "words": "lorem ipsum  dolor\n" * 60_000,
}


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("backend", ["tiktoken", "fastokens"])
def test_long_runs_have_tiktokens_ids(name: str, backend: str) -> None:
    text = LONG[name]
    encoding = load_tokenizer("gpt2")
    ids = Encoder(encoding, backend).encode_pieces(list(pieces(text, encoding)))[0]
    # tiktoken itself gives up on a run of white space before another character: its ids for the
    # part that ends with the run, which it does take, and for the rest are the reference.
    cut = {"spaces": 1_999_999, "newlines": 1_200_000}.get(name, len(text))
    expected = encoding.encode_ordinary(text[:cut]) + encoding.encode_ordinary(text[cut:])
    assert np.array_equal(ids, expected)


def test_cuts_keep_the_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    encoding = load_tokenizer("gpt2")
    monkeypatch.setattr(encoder_module, "PIECE", 3)
    draw = random.Random(6)
    letters = "ab'sI1. ,\t\n\r\x1c\x85\xa0\u2003\u3000\u00e9\u4e2d"
    for _ in range(3000):
        text = "".join(draw.choices(letters, k=draw.randint(0, 40)))
        parts = list(pieces(text, encoding))
        assert "".join(parts) == text
        ids = [token for part in parts for token in encoding.encode_ordinary(part)]
        assert ids == encoding.encode_ordinary(text)


OTHER = {
    # Of cl100k_base, of o200k_base (shortened), and some that count or look behind.
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}]*[\p{Ll}]+|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "lines": r"[^\n]*\n|[^\n]+",
    "groups": r"(?s:.{1,7})",
    "behind": r"(?<=\d )\p{L}+|(?m:^.)|\p{L}|(?s:.)",
    "whole": r"(?s:.+)",
}


def other_encoding(name: str) -> tiktoken.Encoding:
    gpt2 = load_tokenizer("gpt2")
    return tiktoken.Encoding(
        name, pat_str=OTHER[name], mergeable_ranks=gpt2._mergeable_ranks,
        special_tokens=gpt2._special_tokens,
    )  # fmt: skip


@pytest.mark.parametrize("name", OTHER)
def test_cuts_with_other_patterns_keep_the_ids(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    encoding = other_encoding(name)
    monkeypatch.setattr(encoder_module, "PIECE", 500)
    monkeypatch.setattr(encoder_module, "MARGIN", 300)
    draw = random.Random(7)
    letters = "aab'sI177.,; \t\n\n\r\x1c\x85\xa0\u2003\u00e9\u4e2d"
    cuts = 0
    for number in range(12):
        chosen = "".join(draw.sample(letters, 8)) if number % 2 else letters
        text = "".join(draw.choices(chosen, k=6000))
        if number % 5 == 0:
            text = re.sub(r"(?<=7)", "1" * draw.randint(0, 400), text, count=5)
        parts = list(pieces(text, encoding))
        assert "".join(parts) == text
        cuts += len(parts) - 1
        ids = [token for part in parts for token in encoding.encode_ordinary(part)]
        assert ids == encoding.encode_ordinary(text)
    # Where nothing may be cut, nothing is.
    assert cuts == 0 if name == "groups" else cuts > 20


@pytest.mark.parametrize("name", ["cl100k", "o200k", "bytes"])
def test_a_long_text_is_cut_with_any_usual_pattern(name: str) -> None:
    words = "the quick brown fox, 1984; jumps over\nthe lazy dog's back and away " * 30_000
    encoding = load_tokenizer("bytes") if name == "bytes" else other_encoding(name)
    parts = list(pieces(words, encoding))
    assert len(parts) == len(words) // encoder_module.PIECE + 1
    assert max(map(len, parts)) < encoder_module.PIECE + 200
    encoder = Encoder(encoding)
    assert np.array_equal(encoder.encode_pieces(parts)[0], encoder.encode_pieces([words])[0])


def test_text_that_cannot_be_cut_is_searched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A document that comes in pieces: what was searched in vain is not searched again."""
    encoding = other_encoding("groups")
    monkeypatch.setattr(encoder_module, "PIECE", 100)
    monkeypatch.setattr(encoder_module, "MARGIN", 64)
    monkeypatch.setattr(part_module, "PIECE", 100)
    monkeypatch.setattr(part_module, "MARGIN", 64)
    tried, proven = [], encoder_module._is_proven

    def trying(text: str, cut: int, encoding: tiktoken.Encoding) -> bool:
        tried.append(cut)
        return proven(text, cut, encoding)

    monkeypatch.setattr(encoder_module, "_is_proven", trying)
    text = "words and words " * 500 + "\nend"
    given = [Text(0, text[at : at + 300], False) for at in range(0, len(text), 300)]
    items = encode([*given[:-1], given[-1]._replace(last=True)], Encoder(encoding))
    (made,) = items
    assert isinstance(made, Encoded)
    assert made.tokens.tolist() == [*encoding.encode_ordinary(text), encoding.eot_token]
    assert len(set(tried)) == len(tried) > 100


def test_a_text_that_tiktoken_cannot_split_is_left_out() -> None:
    gpt2 = load_tokenizer("gpt2")
    other = tiktoken.Encoding(
        "other",
        pat_str=gpt2._pat_str + "|unused",
        mergeable_ranks=gpt2._mergeable_ranks,
        special_tokens=gpt2._special_tokens,
    )
    encoder = Encoder(other)
    assert encoder.backend == "tiktoken" and "fastokens does not do other" in encoder.note
    with pytest.raises(ValueError, match="Regex error"):
        encoder.encode_pieces([" " * 1_000_000 + "x"])
    with pytest.raises(UsageError, match="backend fastokens: fastokens does not do other"):
        Encoder(other, "fastokens")


def test_a_fast_backend_that_is_wrong_is_not_used() -> None:
    encoder = Encoder(load_tokenizer("gpt2"), "fastokens")
    right = encoder._fast

    def wrong(texts: list[str]) -> tuple[bytes, bytes]:
        ids, offsets = right([text.replace("I", "J") for text in texts])
        return ids, offsets

    encoder._fast = wrong
    with pytest.raises(DamageError, match="other ids than tiktoken.*--backend tiktoken"):
        encoder.encode_pieces(["I am"] * 200)
    encoder.check()
    assert encoder.backend == "tiktoken" and "self-check" in encoder.note
    assert encoder.encode_pieces(["I am"])[0].tolist() == [40, 716]
