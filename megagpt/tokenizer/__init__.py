"""Tokenizers: every one is a `tiktoken.Encoding` with one END-OF-DOCUMENT token (L1).

`load_tokenizer` takes a name or a path:

- `gpt2`: the GPT-2 vocabulary, built from the merge list that this package carries, so that it
  needs no network (50,257 tokens, END-OF-DOCUMENT 50256);
- `bytes`: the 256 bytes and END-OF-DOCUMENT (257 tokens);
- another encoding of tiktoken (`cl100k_base`, `o200k_base`, ...), which tiktoken downloads once;
- a `tokenizer.json` with a byte-level BPE, as `data_prep/train_tokenizer.py` writes it.

The vocabulary size is `encoding.n_vocab`. Text is encoded with `encode_ordinary`, which takes the
literal `<|endoftext|>` in a document for text, never for the token.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megagpt.errors import DamageError, UsageError

if TYPE_CHECKING:
    import tiktoken

END_OF_DOCUMENT = "<|endoftext|>"
"""The special token that ends every document in the shards."""

DOWNLOAD_SECONDS = 60
"""How long a download of one of tiktoken's vocabularies may take; tiktoken has no limit."""

__all__ = ["END_OF_DOCUMENT", "end_of_document", "fingerprint", "load_tokenizer", "token_dtype"]


def load_tokenizer(name: str | Path, expected: str = "") -> tiktoken.Encoding:
    """The encoding called `name`, or the one in the file at `name`.

    `expected` is the `fingerprint` of the vocabulary that made the tokens, "" where it is not
    known. Raises UsageError for an unknown name, a vocabulary that cannot be downloaded, a file
    whose tokenizer tiktoken cannot reproduce, or an encoding without END-OF-DOCUMENT; DamageError
    when the packaged merge list or a tokenizer file is not what it should be, or `name` is another
    vocabulary than expected.
    """
    encoding = _load(str(name))
    if expected and (found := fingerprint(encoding)) != expected:
        raise DamageError(
            f"tokenizer {name} is another one than the tokens were made with (fingerprint "
            f"{found[:12]}..., expected {expected[:12]}...); put the right one there"
        )
    return encoding


def _load(text: str) -> tiktoken.Encoding:
    """The encoding by its name or file, whatever it holds."""
    from megagpt.tokenizer.gpt2 import bytes_encoding, gpt2_encoding
    from megagpt.tokenizer.json import read_tokenizer_file
    from megagpt.tokenizer.palette import holds_palette

    if not text:
        raise UsageError("tokenizer: none is named; these are ids that no tokenizer made of text")
    if text == "gpt2":
        return gpt2_encoding()
    if text == "bytes":
        return bytes_encoding()
    path = Path(text)
    if path.is_dir() and (path / "tokenizer.json").is_file():
        path = path / "tokenizer.json"
    if path.is_file():
        if holds_palette(path):
            raise UsageError(
                f"{path}: a palette of images, whose ids are colours and no text; evaluate.samples "
                "of a run file draws images, and so does megagpt.use.pictures"
            )
        return read_tokenizer_file(path)
    if path.suffix or "/" in text:
        raise UsageError(f"tokenizer file {text} does not exist; give a name or an existing file")
    return _tiktoken_encoding(text)


def end_of_document(encoding: tiktoken.Encoding) -> int:
    """The id of END-OF-DOCUMENT. Raises UsageError when the encoding has none."""
    token = encoding._special_tokens.get(END_OF_DOCUMENT)
    if token is None:
        raise UsageError(
            f"tokenizer {encoding.name} has no {END_OF_DOCUMENT} token, which must end every "
            "document; choose another tokenizer or add the token to its file"
        )
    return token


def token_dtype(vocab_size: int) -> np.dtype:
    """What holds an id: uint16 when every one fits, int32 otherwise."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<i4")


@lru_cache(maxsize=8)
def fingerprint(encoding: tiktoken.Encoding) -> str:
    """sha256 over the pattern, the ranks and the special tokens: all that decides the ids."""
    digest = hashlib.sha256()
    digest.update(encoding._pat_str.encode() + b"\n")
    for token, rank in sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1]):
        digest.update(b"%d %s\n" % (rank, token.hex().encode()))
    for name, rank in sorted(encoding._special_tokens.items()):
        digest.update(b"special %d %s\n" % (rank, name.encode().hex().encode()))
    return digest.hexdigest()


def _tiktoken_encoding(name: str) -> tiktoken.Encoding:
    """One of tiktoken's own encodings, from its cache or the network."""
    import threading

    import tiktoken

    known = tiktoken.list_encoding_names()
    if name not in known:
        raise UsageError(
            f"unknown tokenizer {name}: neither a file nor one of bytes, {', '.join(known)}"
        )
    found: list[tiktoken.Encoding | Exception] = []

    def fetch() -> None:
        try:
            found.append(tiktoken.get_encoding(name))
        except Exception as error:  # requests, OSError and a wrong hash all mean the same here
            found.append(error)

    # A thread, because tiktoken's download hangs for ever behind a firewall that drops packets.
    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(DOWNLOAD_SECONDS)
    if not found or isinstance(found[0], Exception):
        reason = type(found[0]).__name__ if found else f"no answer in {DOWNLOAD_SECONDS} s"
        raise UsageError(
            f"tokenizer {name}: tiktoken could not load its vocabulary ({reason}). It is "
            "downloaded once: load it where there is a network and copy the folder that "
            "TIKTOKEN_CACHE_DIR names, or use gpt2 or bytes, which need none"
        )
    end_of_document(found[0])
    return found[0]
