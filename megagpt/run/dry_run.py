"""Everything up to the first step, without training: `megagpt.train --dry-run` (L2).

The run file and DeepSpeed's JSON are read, every kind of rank is built on the meta device, corpora
that are here are opened, and the first step is worked out. Nothing is written.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megagpt.checkpoint import list_checkpoints
from megagpt.checkpoint.record import step_of
from megagpt.checkpoint.start import check_start
from megagpt.config import RunConfig
from megagpt.corpus.manifest import MANIFEST
from megagpt.engine.rehearsal import Rehearsed, rehearse
from megagpt.errors import UsageError
from megagpt.order.loader import check_corpora, training_loader
from megagpt.plan.layout import Layout, accumulation_steps, micro_batch_of
from megagpt.run.state import RunState


def planned_ranks(run_file: str) -> int | None:
    """Ranks of the plan that `megagpt plan --write` left beside the run file; None: no plan.

    Raises UsageError for a plan that cannot be read.
    """
    path = Path(run_file).with_name("plan.json")
    if not path.exists():
        return None
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["cluster"]["gpus"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path}: not a plan that megagpt plan --write wrote ({error!r}); give --ranks N"
        ) from None


def dry_run(
    config: RunConfig, layout: Layout, ds_config: dict[str, Any], ranks: Sequence[int]
) -> Iterator[str]:
    """Lines about what each of these ranks would do. Raises what a start would raise."""
    yield f"dry run: {layout}; nothing is trained and nothing is written"
    for one in rehearse(config, layout, ds_config, ranks):
        yield _told(one, layout)
    yield from _corpora(config)
    yield from _start(config)
    step = RunState().next_step(config)
    yield (
        f"first step: {step.n_samples:,} sequences in micro-batches of "
        f"{micro_batch_of(config, layout, step.batch_tokens)}, "
        f"{accumulation_steps(config, layout, step.batch_tokens)} on each data rank, "
        f"at a rate of {step.lr:.3e}"
    )
    if saved := list_checkpoints(Path(config.output)):
        yield f"{config.output}: a checkpoint of step {step_of(saved[-1])} is there to go on from"
    yield "accepted: everything up to the first step"


def _told(one: Rehearsed, layout: Layout) -> str:
    place = f"rank {one.rank}"
    if layout.pipelined:
        place += f" (stage {one.stage}, tensor rank {one.tensor_rank}"
        place += f", as {layout.data - 1:,} others)" if layout.data > 1 else ")"
    elif layout.data > 1:
        place += f" (as the other {layout.data - 1:,})"
    return f"{place}: {one.n_parameters:,} parameters, {one.layers[0]} to {one.layers[-1]}"


def _corpora(config: RunConfig) -> Iterator[str]:
    """Opens the corpora; those that are not on this machine are told instead."""
    folders = [source.path for source in (*config.data.train, *config.data.validation)]
    missing = [folder for folder in folders if not (Path(folder) / MANIFEST).exists()]
    for folder in dict.fromkeys(missing):
        yield f"{folder}: not on this machine, so it is not looked at"
    if missing:
        return
    check_corpora(config)
    yield f"data: {len(folders)} corpora are there and fit the model"


def _start(config: RunConfig) -> Iterator[str]:
    """Looks at the weights that a new run would start from, where they are on this machine."""
    path = config.init_from
    if not path or list_checkpoints(Path(config.output)):
        return
    if not Path(path).exists():
        yield f"init_from = {path!r}: not on this machine, so it is not looked at"
        return
    there = all((Path(source.path) / MANIFEST).exists() for source in config.data.train)
    loader = training_loader(config) if there else None
    tokenizer = (loader.tokenizer_name, loader.tokenizer_fingerprint) if loader else ("", "")
    facts = check_start(config, tokenizer).facts
    yield f"init_from = {path!r}: weights of step {facts['step']:,} are there and fit the model"
