"""Can this run begin: its file, its layout, its shards, its disk and memory (numpy, no torch)."""

import functools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from megagpt.check.doctor.check import FAIL, OK, WARN, Check
from megagpt.check.doctor.host import Gpu, Place
from megagpt.check.doctor.shared import existing
from megagpt.config import RunConfig
from megagpt.corpus.verify import verify_shards
from megagpt.errors import MegagptError, UsageError
from megagpt.order.loader import TokenLoader, training_loader
from megagpt.order.windows import TokenWindows
from megagpt.plan.ds_config import read_ds_config, resolve
from megagpt.plan.layout import layout_of, spans_hosts
from megagpt.plan.memory import checkpoint_bytes, checkpoints_kept

WITHOUT_BF16 = ("P100", "V100", "T4", "RTX 20", "Quadro RTX")
"""GPUs before the Ampere generation, by what is in their names."""


def check_run(config: RunConfig, place: Place, cards: list[Gpu], full: bool) -> Iterator[Check]:
    """All checks of a run file. full: read every byte of every shard."""
    yield check_layout(config, place)
    yield from check_shards(config, full)
    yield check_precision(config.parallel.dtype, cards)
    yield check_disk(config)
    yield check_memory(config, place, available_memory())


def check_layout(config: RunConfig, place: Place) -> Check:
    """The run divides over the ranks as the launcher gives them."""
    parallel = config.parallel
    world = place.ranks or parallel.pipeline * parallel.tensor
    layout = layout_of(config, world)
    try:
        resolve(config, layout, read_ds_config(parallel.ds_config))
    except UsageError as error:
        return Check("layout", FAIL, str(error))
    slow = spans_hosts(layout, place.ranks_here) if place.ranks_here else ""
    if slow:
        return Check("layout", WARN, f"{layout}: {slow}")
    guess = "" if place.ranks else ", the fewest this run can have"
    return Check("layout", OK, f"{layout}{guess}")


# --- data ---------------------------------------------------------------------------------------


def check_shards(config: RunConfig, full: bool) -> Iterator[Check]:
    """Opens the mixture and each validation set as training does, and looks at each folder."""
    n_ctx = config.model.n_ctx
    openers: list[Callable[[], TokenLoader]] = [functools.partial(training_loader, config)]
    for source in config.data.validation:
        openers.append(functools.partial(TokenLoader, [(Path(source.path), 1.0)], n_ctx, 0))
    for opener in openers:
        try:
            loader = opener()
            checks = [_check_vocabulary(config, s) or _check_folder(s, full) for s in loader.stores]
        except (MegagptError, OSError) as error:
            checks = [Check("shards", FAIL, str(error))]
        yield from checks


def _check_vocabulary(config: RunConfig, store: TokenWindows) -> Check | None:
    held = store.manifest.vocab_size
    if held == config.model.vocab_size:
        return None
    return Check(
        "shards",
        FAIL,
        f"{store.folder}: {held} tokens in its vocabulary, but model.vocab_size = "
        f"{config.model.vocab_size}",
        f"set model.vocab_size = {held}, or prepare the corpus with the model's tokenizer",
    )


def _check_folder(store: TokenWindows, full: bool) -> Check:
    """The files of a folder against its manifest: their sizes, or with `full` every byte."""
    folder, manifest = store.folder, store.manifest
    if full:
        problems = verify_shards(folder)
    else:
        # The sizes of the .bin files were compared when the folder was opened.
        indexes = (manifest.index_path(shard) for shard in manifest.shards)
        problems = [f"{path}: No such file" for path in indexes if not path.exists()]
    if problems:
        lines = "\n".join(problems[:5]) + ("\n..." if len(problems) > 5 else "")
        return Check("shards", FAIL, lines, "restore the files, or prepare the corpus again")
    looked = "every byte read" if full else "sizes as in the manifest"
    count = len(manifest.shards)
    held = f"{count} shard{'s' * (count > 1)}, {manifest.tokens:,} tokens"
    return Check("shards", OK, f"{folder}: {held}, {looked}")


# --- precision, disk, memory --------------------------------------------------------------------


def check_precision(dtype: str, cards: list[Gpu]) -> Check:
    """The devices carry parallel.dtype."""
    if dtype == "fp16" and not cards:
        return Check(
            "precision", FAIL, "parallel.dtype = 'fp16' needs a GPU", "use bf16 or fp32 on CPUs"
        )
    old = [card.name for card in cards if any(name in card.name for name in WITHOUT_BF16)]
    if dtype == "bf16" and old:
        detail = f"parallel.dtype = 'bf16': {old[0]} has no bf16"
        return Check("precision", FAIL, detail, "set parallel.dtype = 'fp16'")
    return Check("precision", OK, dtype)


def check_disk(config: RunConfig) -> Check:
    """Room for all checkpoints that the run will keep at once, besides those it has already."""
    run = Path(config.output)
    place = existing(run)
    if not os.access(place, os.W_OK):
        remedy = "mend its permissions, or choose another `output`"
        return Check("disk", FAIL, f"{place}: cannot write there", remedy)
    free = shutil.disk_usage(place).free
    one, count = checkpoint_bytes(config.model), checkpoints_kept(config)
    there = sum(f.stat().st_size for f in (run / "checkpoints").rglob("*.safetensors"))
    needed = max(0, one * count - there)
    text = (
        f"{place}: {_size(free)} free, {_size(needed)} needed: {count} checkpoints of {_size(one)}"
        + (f" less {_size(there)} there" if there else "")
    )
    if free < needed:
        return Check(
            "disk",
            FAIL,
            text,
            "make space, choose another `output`, or lower checkpoint.keep_last or "
            "raise checkpoint.keep_every_tokens",
        )
    return Check("disk", OK, text)


def available_memory(path: Path = Path("/proc/meminfo")) -> int:
    """Bytes of host memory that programs can still have; 0 where the system does not say."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(found[0]) if found else 0


def check_memory(config: RunConfig, place: Place, available: int) -> Check:
    """Host memory for the copy from which checkpoints are written while training goes on."""
    world = place.ranks or config.parallel.pipeline * config.parallel.tensor
    here = place.ranks_here or world
    # Each rank copies the part that it owns and nothing else.
    needed = checkpoint_bytes(config.model) * here // world
    if not config.checkpoint.background or not available:
        return Check("memory", OK, f"{_size(available)} available")
    text = f"{_size(available)} available, {_size(needed)} for the copy of a checkpoint"
    if available < needed:
        return Check("memory", FAIL, text, "set checkpoint.background = false, or use more hosts")
    return Check("memory", OK, text)


def _size(count: float) -> str:
    """Bytes for a person to read."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"
