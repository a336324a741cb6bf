"""Does a tokenizer file give Hugging Face's ids in tiktoken, and all of the text? (L1)

The patterns that cut a text into pieces are run by two libraries of regular expressions, and no
proof is tried for them: they are compared on hard strings, and asked to cover every character.
The merges are proven where the file is read (json.py).
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tiktoken

HARD = [
    "I'll we've they're he'd 'S 'LL don't''s",
    "  two   three\n\n\tfour \r\n end ",
    "0123 4567 8,900.50 \u0661\u0662\u0663 \u00bd \u2163",
    "na\u00efve caf\u00e9 e\u0301 \u0130\u0131 \u1e9e\ufb01",
    "\u4e2d\u6587\u5b57 \u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4 \u0939\u093f\u0928\u094d\u0926\u0940",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f \U0001f1e9\U0001f1ea",
    "<|endoftext|> <|end of text|> \x00\x01\x1c\x1f\x7f\x85\xa0\u2028\u3000\ufeff\ufffd",
    "{\"key\": [1, 2.5e-3], 'x': None}  # comment\n\t\treturn _self.__init__(*args)\n",
    "http://example.com/a?b=c&d=%20#e user@host !!! ??? ... --- === *** ///",
    "a" * 300 + " " * 300 + "." * 300 + "\n" * 300 + "\u4e2d" * 99 + "x",
    "".join(chr(code) for code in range(0x20, 0x3000, 7)),
    "".join(chr(code) for code in range(0x10000, 0x20000, 257)),
]
"""Texts on which tokenizers differ."""


def compare(content: bytes, encoding: tiktoken.Encoding) -> str:
    """Why the file does not give its ids in tiktoken, by hard strings; "" when it does."""
    import regex
    import tokenizers

    # Not tiktoken's dialect to the letter, but this asks without its panic on the screen.
    with suppress(regex.error):
        pattern = regex.compile(encoding._pat_str, regex.VERSION1)
        if not all(match.group() for text in HARD for match in pattern.finditer(text)):
            return "its pattern matches the empty string, which is no token"
    plane = "".join(chr(code) for code in range(0x10000) if not 0xD800 <= code < 0xE000)
    for text in (*HARD, plane):
        try:
            back = encoding.decode(encoding.encode_ordinary(text))
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of tiktoken, below no other class
                raise
            return f"tiktoken gives up on {text[:20]!r}: its pattern matches the empty string"
        if back != text:
            place = len(os.path.commonprefix([back, text]))
            return f"its pattern passes over {text[place]!r}, which would vanish from the text"
    try:
        theirs = tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises nothing more exact
        return f"Hugging Face tokenizers cannot read it ({error})"
    theirs.no_truncation()
    theirs.no_padding()
    # A special token in a text is text here.
    theirs.encode_special_tokens = True
    for text in (*HARD, *(f"a{token}b {token} " for token in encoding.special_tokens_set)):
        if encoding.encode_ordinary(text) != theirs.encode(text, add_special_tokens=False).ids:
            return f"Hugging Face tokenizers give other ids for {text[:60]!r}"
    return ""
