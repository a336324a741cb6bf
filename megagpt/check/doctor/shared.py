"""A file that one host writes for the others to see (stdlib only)."""

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path

from megagpt.config import RunConfig


def existing(path: Path) -> Path:
    """The nearest folder above `path`, or itself, that is there."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.is_dir())


def folder_of(config: RunConfig | str) -> Path:
    """Where the run folder is or will be made; without a run the current folder."""
    return existing(Path() if isinstance(config, str) else Path(config.output))


@contextlib.contextmanager
def nonce(folder: Path) -> Iterator[tuple[str, str]]:
    """Writes a file nobody has seen before, and removes it; its path and content.

    Both empty for a folder that cannot be written to: the check of the disk names it.
    """
    path, text = folder / f".megagpt-doctor-{secrets.token_hex(8)}", secrets.token_hex(16)
    try:
        path.write_text(text)
    except OSError:
        yield "", ""
        return
    try:
        yield str(path), text
    finally:
        path.unlink(missing_ok=True)
