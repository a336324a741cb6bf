"""A model as others keep it, whatever it lies in (L3)."""

import json
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
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
        """A tensor in fp32. Raises UsageError for one of whole numbers, which is quantised, and for
        one of which a number is none or infinite."""
        found = self.read(name)
        if not isinstance(found, Tensor):
            raise UsageError(f"{self.path}: {name} is {type(found).__name__}: must be a tensor")
        if not found.is_floating_point():
            raise UsageError(f"{self.path}: {name} is of {found.dtype}: must be of a float type")
        whole = found.float()
        if not whole.isfinite().all():
            raise UsageError(
                f"{self.path}: {name} holds {_not_finite(whole)}: all must be finite in fp32; take "
                "weights from before they went wrong"
            )
        return whole


def _not_finite(whole: Tensor) -> str:
    """How many of a tensor's numbers are not finite, and the first of them."""
    wrong = whole[~whole.isfinite()]
    return f"{len(wrong)} of {whole.numel()} numbers like {wrong[0].item()}"


def json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises DamageError when there is none."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamageError(f"{path}: not readable as JSON ({error}); copy it again") from None
    if not isinstance(tree, dict):
        raise DamageError(f"{path}: not a JSON object; copy it again")
    return tree


def saved_by_torch(path: Path, stand_in: type | None = None) -> Any:
    """What torch.save wrote, mapped where its format allows it. Nothing in it is executed.

    stand_in: made in the place of every class of others. Raises UsageError for a file that would
    have to execute code, DamageError for one that is not readable.
    """
    try:
        allowed: list[Any] = []
        if stand_in is not None:
            classes = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            allowed = [(stand_in, name) for name in classes]
        # Files of before 2020 are no zip: they are read whole.
        mapped = zipfile.is_zipfile(path)
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError:
        raise UsageError(
            f"{path}: holds more than tensors and plain values, and would have to execute code to "
            "be read; save its state_dict as safetensors where you trust it"
        ) from None
    except Exception as error:  # torch has a dozen kinds for damaged bytes
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DamageError(f"{path}: not readable ({reason}); copy it again") from None


def table(tree: Any, path: Path) -> dict[str, Any]:
    """A tree of a file that must be name -> tensor. Raises UsageError."""
    if not isinstance(tree, dict):
        raise UsageError(f"{path}: holds {type(tree).__name__}, not a table of tensors")
    if strange := [key for key in tree if not isinstance(key, str)]:
        raise UsageError(f"{path}: has the key {strange[0]!r}, which names no tensor")
    return tree
