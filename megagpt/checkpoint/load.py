"""Loading: nothing is believed unread, and any layout reads what any other wrote (L2)."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megagpt.checkpoint import record
from megagpt.checkpoint.record import CONFIG, INDEX, CheckpointRecord
from megagpt.checkpoint.slice_file import MOST_PROBLEMS, SLICES, SliceReader, rank_of
from megagpt.checkpoint.slice_index import index_text
from megagpt.config import ModelConfig, RunConfig, load_run
from megagpt.corpus.manifest import MANIFEST, read_manifest
from megagpt.engine.engine import Engine
from megagpt.engine.slices import STATES, OptimizerState
from megagpt.errors import DamageError, MegagptError, UsageError
from megagpt.model import GPT
from megagpt.tokenizer import load_tokenizer
from megagpt.tokenizer.portable import FILE, tokenizer_content

if TYPE_CHECKING:
    import tiktoken

log = logging.getLogger(__name__)

RESULT_SECTIONS = ("model", "schedule", "optimizer")
"""What decides the weights, beside the seed and the data, whose fingerprint is compared."""
HARMLESS = ("model.vocab_multiple",)
"""Keys in them that change no result."""


# --- is it whole? -------------------------------------------------------------------------------


def verify(folder: Path) -> list[str]:
    """Everything that is wrong with a checkpoint, empty when it is whole: every byte is read, the
    configuration and the slices are opened. Raises UsageError for another version's manifest."""
    try:
        opened = examined(folder)
    except UsageError as error:
        record.read_record(folder)  # raises it again where it is of the manifest
        return [f"{error}\n  no run can go on from it, and nothing can open it"]
    return opened.problems or _vocabulary_problems(folder)


def shapes_of(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter of a model, without padding, by its canonical name."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in GPT(model).named_parameters()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """A checkpoint that was looked at."""

    problems: list[str]
    """What is wrong with it; then the rest is not all there."""
    saved: CheckpointRecord | None = None
    config: RunConfig | None = None
    index: str | None = None
    """The content of slices.json; None: there is none."""


def examined(folder: Path) -> Opened:
    """A checkpoint, every byte of which one process has read. Raises UsageError where another
    version of megagpt wrote the manifest or the configuration."""
    opened = _manifest_of(folder)
    if opened.saved is None:
        return opened
    return _whole(folder, opened, _share_problems(folder, opened, slice(None)))


def _manifest_of(folder: Path) -> Opened:
    try:
        saved = record.named_record(folder)
    except DamageError as error:
        return Opened(problems=[str(error)])
    index = None
    if INDEX in {file.name for file in saved.files}:
        # What cannot be read is named where its checksum is compared.
        with suppress(OSError):
            index = (folder / INDEX).read_bytes().decode(errors="replace")
    return Opened(problems=[], saved=saved, index=index)


def _share_problems(folder: Path, opened: Opened, share: slice) -> list[str]:
    """What is wrong with some of the files."""
    assert opened.saved is not None
    files = opened.saved.files[share]
    problems = [problem for file in files if (problem := file.problem(folder))]
    if problems or opened.index is None:
        return problems
    ranks = [rank_of(file.name) for file in files if SLICES.fullmatch(file.name)]
    try:
        return SliceReader(folder, index=opened.index).differences(ranks)
    except DamageError as error:
        return [str(error)]


def _whole(folder: Path, opened: Opened, problems: list[str]) -> Opened:
    """The rest of what every rank has to know of a checkpoint, where its files are whole."""
    assert opened.saved is not None
    if problems:
        # Of a damaged index every rank has said that it cannot be read.
        return Opened(problems=list(dict.fromkeys(problems)))
    config = load_run(folder / CONFIG)
    try:
        reader = SliceReader(folder, index=opened.index)
    except DamageError as error:
        return Opened(problems=[str(error)])
    # What the manifest does not name has no checksum, so nothing of it may be read.
    unknown = sorted(reader.files - {file.name for file in opened.saved.files})
    problems = [f"{folder / INDEX}: names {name}, but the manifest does not" for name in unknown]
    problems = problems[:MOST_PROBLEMS] or reader.problems(shapes_of(config.model))
    index = index_text(reader.parameters) if opened.index is None else opened.index
    return replace(opened, problems=problems, config=config, index=index)


def _vocabulary_problems(folder: Path) -> list[str]:
    """Why the tokenizer that a checkpoint carries is not the one that it was trained with."""
    saved = record.read_record(folder)
    if FILE not in {file.name for file in saved.files}:
        return []
    try:
        tokenizer_content(str(folder / FILE), saved.data.get("vocabulary", ""))
    except MegagptError as error:
        return [str(error)]
    return []


def vocabulary_of(folder: Path, facts: Mapping[str, Any]) -> "tiktoken.Encoding":
    """The tokenizer that goes with the weights in `folder`; `facts` are what is told of them.

    Checkpoints of November 2026 or before carry none: there it is found by the name or path that
    they tell, and has to be that of the corpus which lies there. Raises DamageError for another,
    and what load_tokenizer raises.
    """
    name, known = facts["tokenizer"], facts["vocabulary"]
    if known and (folder / FILE).exists():
        return load_tokenizer(folder / FILE, known)
    path = Path(name)
    if not known and path.name == FILE and (path.parent / MANIFEST).exists():
        known = read_manifest(path.parent).fingerprint
    return load_tokenizer(name, known)


def data_of_another_tokenizer(folder: Path) -> list[str]:
    """The corpora of a checkpoint's run that lie where they lay and have another tokenizer now."""
    known = record.read_record(folder).data.get("vocabulary", "")
    data, found = load_run(folder / CONFIG).data, []
    for path in [source.path for source in (*data.train, *data.validation)]:
        try:
            there = read_manifest(path).fingerprint
        except MegagptError:
            continue  # moved, or damaged, as `megagpt data verify` tells
        if known and there not in ("", known):
            found.append(path)
    return found


def tell_strangers(folder: Path) -> None:
    """Warns of what lies in a checkpoint's folder and is not read."""
    if names := record.strangers(folder, record.read_record(folder).files):
        log.warning(
            "%s: not in its manifest, and not read: %s", folder, ", ".join(map(repr, names))
        )


# --- resuming -----------------------------------------------------------------------------------


def resume(
    run: Path,
    config: RunConfig,
    engine: Engine,
    fingerprints: Callable[[int], Sequence[str]],
    allow_changes: bool = False,
) -> CheckpointRecord | None:
    """Loads the newest whole checkpoint of `run` into the engine; None when there is none yet.
    `fingerprints` are the names of the order of so many samples, TokenLoader.known_fingerprints.

    Damaged ones are named, set aside and passed over. Raises DamageError when all that are there
    are damaged (they are left as they are), UsageError when the run is not the one that was saved
    or another version of megagpt saved it.
    """
    first = engine.ranks.rank == 0
    # One rank's view of the disk counts: another host's may lag behind.
    folders = engine.by_first(lambda: _tidied(run))
    damaged: list[Path] = []
    for folder in reversed(folders):
        opened = _opened_together(folder, engine)
        if opened.problems:
            damaged.append(folder)
            if first:
                log.error("damaged checkpoint: %s", "; ".join(opened.problems))
            continue
        assert opened.saved is not None and opened.config is not None
        _refuse_changes(folder, opened, config, fingerprints, allow_changes)
        if first:
            tell_strangers(folder)
            for bad in damaged:
                log.error("set aside as %s", record.set_aside(bad))
        load_into(SliceReader(folder, index=opened.index), opened.saved, engine)
        return opened.saved
    if damaged:
        names = ", ".join(folder.name for folder in damaged)
        raise DamageError(
            f"{record.folder_of(run)}: no checkpoint is whole ({names} damaged, named above); "
            "restore one from a copy, or use another output to start anew"
        )
    return None


def _tidied(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first, once what a crash left half-written is gone."""
    for path in record.remove_unfinished(run):
        log.info("removed %s, which was never finished", path)
    return record.list_checkpoints(run)


def _opened_together(folder: Path, engine: Engine) -> Opened:
    """As `examined`; every rank reads its share of the files, and rank 0 all that every rank has to
    know.

    Raises UsageError, on every rank, where another version of megagpt wrote the manifest or the
    configuration.
    """
    opened = engine.by_first(lambda: _manifest_of(folder))
    if opened.saved is None:
        return opened
    rank, world = engine.ranks.rank, engine.ranks.world
    found = engine.collect(_share_problems(folder, opened, slice(rank, None, world)))
    return engine.by_first(lambda: _whole(folder, opened, [p for own in found for p in own]))


def load_into(reader: SliceReader, saved: CheckpointRecord, engine: Engine) -> None:
    """Fills the engine's slices and counts from a verified checkpoint, one parameter at a time."""
    for piece in engine.slices():
        for key in STATES:
            piece.write(key, reader.read(piece, key))
    engine.restore(OptimizerState(updates=saved.updates, loss_scale=saved.loss_scale))


# --- is it the same run? ------------------------------------------------------------------------


def _deciding(config: RunConfig) -> dict[str, Any]:
    """Every key of a run file that decides the weights, with its value."""
    tables = {section: dataclasses.asdict(getattr(config, section)) for section in RESULT_SECTIONS}
    keys = {f"{section}.{k}": v for section, table in tables.items() for k, v in table.items()}
    first = {"seed": config.seed, "init_from": config.init_from}
    return first | {k: v for k, v in keys.items() if k not in HARMLESS}


def differences(saved: RunConfig, asked: RunConfig) -> list[str]:
    """Keys that decide the weights and differ, as "key: saved -> asked"."""
    old, new = _deciding(saved), _deciding(asked)
    return [f"{key}: {old[key]!r} -> {new[key]!r}" for key in old if old[key] != new[key]]


def _rates(before: RunConfig, now: RunConfig, tokens: int) -> str:
    """What a change does to the learning rate where the run goes on, or else where it would have
    ended; "" where it does nothing."""
    for at in (tokens, before.schedule.total_tokens):
        old, new = before.schedule.lr(at), now.schedule.lr(at)
        if abs(old - new) > 0.01 * old:
            break
    else:
        return ""
    text = f"learning rate at {at:,} tokens: {old:.3g} -> {new:.3g}"
    if new > old and now.schedule.decay_tokens == 0:
        end = before.schedule.decay_tokens or before.schedule.total_tokens
        text += f"; schedule.decay_tokens={end} keeps it low"
    return text


def _refuse_changes(
    folder: Path,
    opened: Opened,
    config: RunConfig,
    fingerprints: Callable[[int], Sequence[str]],
    allowed: bool,
) -> None:
    """Raises UsageError when the run would go on as another run than the one saved."""
    before, saved = opened.config, opened.saved
    assert before is not None and saved is not None
    changes = differences(before, config)
    if changes and (rates := _rates(before, config, saved.tokens)):
        changes.append(rates)
    if saved.data["fingerprint"] not in fingerprints(saved.samples):
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
