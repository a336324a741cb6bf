"""Imports that are refused."""

from pathlib import Path

import pytest

from megagpt.errors import UsageError
from megagpt.hub.importing import import_model


def refused(
    path: Path, match: str, kind: type[Exception] | tuple[type[Exception], ...] = UsageError
) -> None:
    """Asserts that the weights in `path` are refused with this message."""
    with pytest.raises(kind, match=match):
        import_model(str(path), path.with_name("refused"))
