"""A model as others keep it, whatever it lies in (L3)."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megagpt.errors import DamageError, UsageError


@dataclass(frozen=True, kw_only=True)
class ForeignModel:
    """A model as others keep it."""

    path: Path
    config: dict[str, Any]
    """As a config.json of transformers says it; model_type may be NANOGPT."""
    names: frozenset[str]
    read: Callable[[str], Any]
    """Name -> tensor as it is stored; of a pickle it may be anything."""

    def fp32(self, name: str) -> Tensor:
        """A tensor in fp32. Raises UsageError for one of whole numbers, which is quantised."""
        found = self.read(name)
        if not isinstance(found, Tensor):
            raise UsageError(f"{self.path}: {name} is {type(found).__name__}: must be a tensor")
        if not found.is_floating_point():
            raise UsageError(f"{self.path}: {name} is of {found.dtype}: must be of a float type")
        return found.float()


def json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises DamageError when there is none."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamageError(f"{path}: not readable as JSON ({error}); copy it again") from None
    if not isinstance(tree, dict):
        raise DamageError(f"{path}: not a JSON object; copy it again")
    return tree
