"""Which code is this? One digest over the package's sources (L0, stdlib only).

Versions do not tell: an edited checkout keeps its number, and a host with an older copy trains a
different run without a word.
"""

import hashlib
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def code_digest(folder: Path = PACKAGE) -> str:
    """sha256, in hex, over names and bytes of every .py file below `folder`, in order of name."""
    digest = hashlib.sha256()
    names = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.py")}
    for name, path in sorted(names.items()):
        content = path.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()
