"""Loading: nothing is believed unread, and any layout reads what any other wrote (L2)."""

import dataclasses
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megagpt.checkpoint import record as manifests
from megagpt.checkpoint.record import Manifest
from megagpt.checkpoint.slice_file import SliceReader
from megagpt.config import RunConfig, load_run
from megagpt.engine.engine import Engine
from megagpt.engine.slices import STATES, OptimizerState
from megagpt.errors import DamageError, UsageError

log = logging.getLogger(__name__)

RESULT_SECTIONS = ("seed", "model", "schedule", "optimizer")
"""What decides the weights, beside the data, whose fingerprint is compared."""
HARMLESS = ("model.vocab_multiple",)
"""Keys in them that change no result."""


def resume(
    run: Path,
    config: RunConfig,
    engine: Engine,
    fingerprint: Callable[[int], str],
    allow_changes: bool = False,
) -> Manifest | None:
    """Loads the newest whole checkpoint of `run` into the engine; None when there is none yet.
    `fingerprint` names the order of so many samples, as TokenLoader's does.

    Damaged ones are named, set aside and passed over. Raises DamageError when all that are there
    are damaged (they are left as they are), UsageError when the run is not the one that was saved
    or another version of megagpt saved it.
    """
    first = engine.ranks.rank == 0
    if first:
        for left in manifests.clean(run):
            log.info("removed %s, which was never finished", left)
    engine.barrier()
    folders = engine.gather([str(f) for f in manifests.list_checkpoints(run)])[0]
    damaged: list[Path] = []
    for folder in map(Path, reversed(folders)):
        problems = _verify_together(folder, engine)
        if not problems:
            manifest = manifests.read_manifest(folder)
            _refuse_changes(folder, manifest, config, fingerprint, allow_changes)
            if first:
                for bad in damaged:
                    log.error("set aside as %s", manifests.set_aside(bad))
            load_into(folder, manifest, engine)
            return manifest
        damaged.append(folder)
        if first:
            log.error("damaged checkpoint: %s", "; ".join(problems))
    if damaged:
        names = ", ".join(folder.name for folder in damaged)
        raise DamageError(
            f"{manifests.folder_of(run)}: no checkpoint is whole ({names} damaged, named above); "
            "restore one from a copy, or use another output to start anew"
        )
    return None


def _verify_together(folder: Path, engine: Engine) -> list[str]:
    """manifest.verify with the files shared out over the ranks; the same list on every rank."""
    try:
        files = manifests.read_manifest(folder).files
    except DamageError as error:
        own = [str(error)] if engine.ranks.rank == 0 else []
    else:
        share = files[engine.ranks.rank :: engine.ranks.world]
        own = [p for p in (manifests.file_problem(folder, f) for f in share) if p]
    return [problem for problems in engine.gather(own) for problem in problems]


def load_into(folder: Path, manifest: Manifest, engine: Engine) -> None:
    """Fills the engine's slices and counts from a verified checkpoint, one parameter at a time."""
    reader = SliceReader(folder)
    for one in engine.slices():
        for key in STATES:
            one.write(key, reader.read(one, key))
    engine.restore(OptimizerState(updates=manifest.updates, loss_scale=manifest.loss_scale))


# --- is it the same run? ------------------------------------------------------------------------


def _flat(tree: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _flat(value, f"{where}.{key}" if where else key)
    else:
        yield where, tree


def differences(saved: RunConfig, asked: RunConfig) -> list[str]:
    """Keys that decide the weights and differ, as "key: saved -> asked"."""
    old, new = (dict(_flat(dataclasses.asdict(c))) for c in (saved, asked))
    return [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in dict.fromkeys([*old, *new])
        if key.split(".")[0] in RESULT_SECTIONS
        and key not in HARMLESS
        and old.get(key) != new.get(key)
    ]


def _refuse_changes(
    folder: Path,
    manifest: Manifest,
    config: RunConfig,
    fingerprint: Callable[[int], str],
    allowed: bool,
) -> None:
    """Raises UsageError when the run would go on as another run than the one saved."""
    changes = differences(load_run(folder / "config.toml"), config)
    if manifest.data["fingerprint"] != fingerprint(manifest.samples):
        changes.append("data: other shards or weights than the checkpoint was trained on")
    if not changes:
        return
    lines = "\n".join(f"  - {change}" for change in changes)
    if allowed:
        log.warning("%s: the run goes on changed:\n%s", folder, lines)
        return
    raise UsageError(
        f"{folder} was saved by another run (saved -> asked):\n{lines}\n"
        "undo the changes, choose another output, or pass --allow-changes to go on regardless"
    )
