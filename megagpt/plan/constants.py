"""The fitted constants of time and memory, and how far they are off (L0).

constants.json is written by benchmarks/planner/fit.py; "kinds" says what each constant means.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megagpt.errors import UsageError
from megagpt.plan.jobs import SYSTEMS, Column, Jobs

PATH = Path(__file__).with_name("constants.json")
_FILE: dict[str, Any] = json.loads(PATH.read_text(encoding="utf-8"))
Constants = Mapping[str, float]
CONSTANTS: dict[str, float] = _FILE["constants"] | _FILE["assumed"]
"""kind or kind.NAME -> value; "assumed" are those of megagpt itself, which no row speaks about."""


def profile_path(gpu: str) -> Path:
    """Where the profile of a cluster of these devices lies: $MEGAGPT_PROFILES or the user's
    configuration."""
    base = os.environ.get("MEGAGPT_PROFILES")
    folder = Path(base) if base else Path.home() / ".config" / "megagpt"
    return folder / f"{gpu}.json"


def read_profile(gpu: str) -> dict[str, Any] | None:
    """What --calibrate wrote for these devices; None where nothing was calibrated. Raises
    UsageError for a profile that cannot be read."""
    path = profile_path(gpu)
    if not path.exists():
        return None
    try:
        tree = dict(json.loads(path.read_text(encoding="utf-8")))
        tree["constants"] = {str(k): float(v) for k, v in tree["constants"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{path}: not a profile that --calibrate wrote ({error!r}); remove it"
        ) from None
    return tree


def constants_for(gpu: str) -> Mapping[str, float]:
    """The constants, with the cluster's own where it was calibrated. Raises UsageError for a
    profile that cannot be read."""
    profile = read_profile(gpu)
    return CONSTANTS | profile["constants"] if profile else CONSTANTS


def interval(jobs: Jobs, what: str, sources: Sequence[str] = ()) -> tuple[Column, Column]:
    """Factors between which 80% of measurements lie, as shares of the prediction, by system.

    `what` is time or memory. A system without its own, or that nobody knows, has those of sources
    that the fit had not seen, and so has a row that was published elsewhere than all that were
    fitted; `sources` names where each was (none named: no row is such).
    """
    known, new = _FILE["intervals"][what], jobs.unknown > 0
    if sources:
        new = new | ~np.isin(sources, _FILE["sources"][what])
    own = np.array([known.get(name, known["other"]) for name in SYSTEMS])[jobs.framework].T
    wide = np.minimum(own[0], known["other"][0]), np.maximum(own[1], known["other"][1])
    return np.where(new, wide[0], own[0]), np.where(new, wide[1], own[1])
