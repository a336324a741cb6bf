"""Can this run begin: its file, its layout, its shards, its disk and memory (numpy, no torch)."""

import functools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from megagpt.check.examine import existing
from megagpt.check.findings import FAIL, OK, WARN, Check, Order
from megagpt.check.machine import Gpu
from megagpt.config import RunConfig
from megagpt.corpus.verify import verify_shards
from megagpt.errors import MegagptError, UsageError
from megagpt.order.fitting import check_vocabulary
from megagpt.order.loader import TokenLoader, training_loader
from megagpt.order.windows import TokenWindows
from megagpt.plan.corpora import overlaps
from megagpt.plan.disk import checkpoint_bytes, checkpoints_kept
from megagpt.plan.ds_config import read_ds_config, resolve
from megagpt.plan.layout import layout_of, spans_hosts
from megagpt.plan.sanity import MOST_EPOCHS, epochs_of, read_times

WITHOUT_BF16 = ("P100", "V100", "T4", "RTX 20", "Quadro RTX")
"""GPUs before the Ampere generation, by what is in their names."""
MOST_PROBLEMS = 5
"""Lines that a folder of shards may take."""


def check_run(config: RunConfig, order: Order, cards: list[Gpu]) -> Iterator[Check]:
    """All checks of a run file."""
    yield check_layout(config, order)
    yield from check_shards(config, order.full)
    yield from check_reading(config)
    yield from check_start_weights(config)
    yield check_precision(config.parallel.dtype, cards)
    yield check_disk(config)
    yield check_memory(config, order, psutil.virtual_memory().available)


def check_layout(config: RunConfig, order: Order) -> Check:
    """The run divides over the ranks as the launcher gives them."""
    layout = layout_of(config, _ranks(config, order))
    try:
        resolve(config, layout, read_ds_config(config.parallel.ds_config))
    except UsageError as error:
        return Check("layout", FAIL, str(error))
    per_host = order.ranks_here or order.gpus_per_node
    if per_host and (slow := spans_hosts(layout, per_host)):
        return Check("layout", WARN, f"{layout}: {slow}")
    guess = "" if order.ranks else ", the fewest this run can have"
    return Check("layout", OK, f"{layout}{guess}")


def _ranks(config: RunConfig, order: Order) -> int:
    """Ranks of the job, or the fewest that the run can have."""
    return order.ranks or config.parallel.pipeline * config.parallel.tensor


# --- data ---------------------------------------------------------------------------------------


def check_shards(config: RunConfig, full: bool) -> Iterator[Check]:
    """Opens the mixture and each validation set as training does, and looks at each folder."""
    openers: list[Callable[[], TokenLoader]] = [functools.partial(training_loader, config)]
    for source in config.data.validation:
        folders = [(Path(source.path), 1.0)]
        openers.append(functools.partial(TokenLoader, folders, config.model.n_ctx, 0))
    fit: list[TokenLoader] = []
    for opener in openers:
        try:
            loader = opener()
            check_vocabulary(config, [*fit[:1], loader])
            fit.append(loader)
            checks = [_check_files(store, full) for store in loader.stores]
        except (MegagptError, OSError) as error:
            checks = [Check("shards", FAIL, str(error))]
        yield from checks


def _check_files(store: TokenWindows, full: bool) -> Check:
    """A folder's files against its manifest: their sizes, or every byte."""
    folder, manifest = store.folder, store.manifest
    if full:
        problems = verify_shards(folder)
    else:
        # The sizes of the other files were compared when the folder was opened.
        indexes = (manifest.index_path(shard) for shard in manifest.shards)
        problems = [f"{path}: No such file" for path in indexes if not path.exists()]
    if problems:
        lines = [*problems[:MOST_PROBLEMS], *["..."] * (len(problems) > MOST_PROBLEMS)]
        remedy = "restore the files, or prepare the corpus again"
        return Check("shards", FAIL, "\n".join(lines), remedy)
    looked = "every byte read" if full else "sizes as in the manifest"
    count = len(manifest.shards)
    shards = f"{count} shard{'s' * (count > 1)}, {manifest.tokens:,} tokens"
    return Check("shards", OK, f"{folder}: {shards}, {looked}")


def check_start_weights(config: RunConfig) -> Iterator[Check]:
    """Whether what a new run starts from is there; megagpt.train --dry-run says whether it fits."""
    from megagpt.checkpoint.record import list_checkpoints

    path = config.init_from
    if not path or list_checkpoints(Path(config.output)):
        return
    there = Path(path).exists()
    remedy = "" if there else "copy the weights there, or correct init_from"
    detail = f"{path} is {'there' if there else 'not there'}"
    yield Check("init_from", OK if there else FAIL, detail, remedy)


def check_reading(config: RunConfig) -> Iterator[Check]:
    """How often each corpus is read; whether training and validation share documents."""
    for path, epochs in epochs_of(config):
        often = epochs > MOST_EPOCHS
        remedy = "the last ones teach little: lower schedule.total_tokens, or prepare more text"
        detail = read_times(path, epochs)
        yield Check("epochs", WARN if often else OK, detail, remedy if often else "")
    for detail, remedy in overlaps(config):
        yield Check("validation", WARN, detail, remedy)


# --- precision, disk, memory --------------------------------------------------------------------


def check_precision(dtype: str, cards: list[Gpu]) -> Check:
    """The devices carry parallel.dtype."""
    if dtype == "fp16" and not cards:
        detail = "parallel.dtype = 'fp16' needs a GPU"
        return Check("precision", FAIL, detail, "use bf16 or fp32 on CPUs")
    old = [card.name for card in cards if any(name in card.name for name in WITHOUT_BF16)]
    if dtype == "bf16" and old:
        detail = f"parallel.dtype = 'bf16': {old[0]} has no bf16"
        return Check("precision", FAIL, detail, "set parallel.dtype = 'fp16'")
    return Check("precision", OK, dtype)


def check_disk(config: RunConfig) -> Check:
    """Room for all checkpoints that the run will keep at once, besides those it has already."""
    from megagpt.checkpoint.record import saved_here

    run = Path(config.output)
    folder = existing(run)
    if not os.access(folder, os.W_OK):
        remedy = "mend its permissions, or choose another `output`"
        return Check("disk", FAIL, f"{folder}: cannot write there", remedy)
    free = shutil.disk_usage(folder).free
    one, count = checkpoint_bytes(config.model), checkpoints_kept(config)
    # What the run has saved goes again; what else lies there stays.
    there = sum(file.bytes for _, saved in saved_here(run) for file in saved.files)
    needed = max(0, one * count - there)
    detail = (
        f"{folder}: {_size(free)} free, {_size(needed)} needed: {count} checkpoints of {_size(one)}"
        + (f" less {_size(there)} there" if there else "")
    )
    if free < needed:
        remedy = (
            "make space, choose another `output`, or lower checkpoint.keep_last or "
            "raise checkpoint.keep_every_tokens"
        )
        return Check("disk", FAIL, detail, remedy)
    return Check("disk", OK, detail)


def check_memory(config: RunConfig, order: Order, available: int) -> Check:
    """Host memory, in bytes, for the copy from which checkpoints are written during training."""
    ranks = _ranks(config, order)
    # Each rank copies the part that it owns and nothing else.
    here = order.ranks_here or order.gpus_per_node or ranks
    needed = checkpoint_bytes(config.model) * here // ranks
    if not config.checkpoint.background:
        return Check("memory", OK, f"{_size(available)} available")
    detail = f"{_size(available)} available, {_size(needed)} for the copy of a checkpoint"
    if order.gpus_per_node and not order.ranks_here:
        detail = f"{_size(needed)} on each host for the copy of a checkpoint"
        return Check("memory", OK, f"{detail}; {_size(available)} available on this one")
    if available < needed:
        return Check("memory", FAIL, detail, "set checkpoint.background = false, or use more hosts")
    return Check("memory", OK, detail)


def _size(count: float) -> str:
    """Bytes for a person to read."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"
