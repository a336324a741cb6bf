"""Texts put into Markdown, as TensorBoard reads it (L1, stdlib only)."""

import html
import re

from megagpt.errors import visible

_MEANS = re.compile(r"([\\`*_{}\[\]()#+\-.!|])")
"""What Markdown, and its tables, take for more than itself."""


def cell(text: str) -> str:
    """A text as one cell of a table, whatever it holds; a line's end becomes a space."""
    return _MEANS.sub(r"\\\1", html.escape(" ".join(visible(text).split()), quote=False))


def code_block(text: str) -> str:
    """A text as a block of code."""
    return "".join(f"    {line}\n" for line in text.splitlines())
