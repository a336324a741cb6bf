"""The batch ramp of a run as a table, before anything is trained (L0, stdlib only).

The ramp itself is config/schedule.py's; training accumulates as many micro-batches as the loader
deals out for a step (`Engine.train_step`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from megagpt.config import RunConfig
from megagpt.config.flops import flops_per_token
from megagpt.plan.accelerators import ACCELERATORS
from megagpt.plan.candidates import stage_layers
from megagpt.plan.layout import (
    Layout,
    accumulation_steps,
    busy_start_tokens,
    idle_share,
    micro_batch_of,
    padded_model,
)
from megagpt.plan.stages import layer_costs, stage_bounds, stage_parameters

UTILISATION = 0.4
"""Of an H100's peak, where hours are reckoned before anything was measured."""


@dataclass(frozen=True, slots=True)
class Row:
    """Steps in a row with the same batch."""

    first_tokens: int
    """Tokens consumed before them."""
    last_tokens: int
    batch_tokens: int
    n_steps: int
    micro_batch: int
    """Sequences of each forward and backward pass."""
    accumulation: int
    """Forward and backward passes of each rank in a step."""
    idle: float
    """Share of those passes that find no samples left."""
    first_lr: float
    """Learning rate of the first of them."""
    last_lr: float


def ramp(config: RunConfig, layout: Layout) -> list[Row]:
    """The whole run as rows of equal batches."""
    schedule = config.schedule
    return [
        Row(
            first_tokens=one.first_tokens,
            last_tokens=one.last_tokens,
            batch_tokens=one.batch_tokens,
            n_steps=one.n_steps,
            micro_batch=micro_batch_of(config, layout, one.batch_tokens),
            accumulation=accumulation_steps(config, layout, one.batch_tokens),
            idle=idle_share(config, layout, one.batch_tokens),
            first_lr=schedule.lr(one.first_tokens + one.batch_tokens),
            last_lr=schedule.lr(one.last_tokens),
        )
        for one in schedule.segments
    ]


HEAD = (
    *("from tokens", "to tokens", "batch tokens", "steps", "micro-batch", "accumulation", "idle"),
    *("first LR", "last LR"),
)
COUNTS = "first_tokens last_tokens batch_tokens n_steps micro_batch accumulation".split()
"""Fields of a row below the first heads."""


def ramp_as_text(rows: Sequence[Row], most: int = 16) -> str:
    """The rows as aligned columns; some left out where they are many, the first and last kept."""
    shown, more = rows, ""
    if len(rows) > most:
        shown = [rows[round(n * (len(rows) - 1) / (most - 5))] for n in range(most - 4)]
        more = f"\n{len(shown)} of {len(rows)} rows; all of them with --json"
    cells = [
        (
            *(f"{getattr(row, name):,}" for name in COUNTS),
            f"{row.idle:.0%}" if row.idle else "-",
            f"{row.first_lr:.3e}",
            f"{row.last_lr:.3e}",
        )
        for row in shown
    ]
    return aligned([HEAD, *cells]) + more


def time_unit(days: float) -> tuple[str, int]:
    """The largest unit of which a time has two or more, and how many of it a day has."""
    units = ("days", 1), ("hours", 24), ("minutes", 24 * 60)
    return next((unit for unit in units if days * unit[1] >= 2), ("seconds", 86_400))


def idle_as_text(config: RunConfig, layout: Layout, rows: Sequence[Row]) -> str:
    """How long which share of the ranks has nothing to do, and how to avoid it; empty: never."""
    idle = [row for row in rows if row.idle]
    if not idle:
        return ""
    # Tokens that each data rank goes through, those of no weight included.
    tokens = [r.n_steps * r.accumulation * r.micro_batch * config.model.n_ctx for r in idle]
    rate = UTILISATION * ACCELERATORS["h100"].tflops * 1e12 * layout.pipeline * layout.tensor
    days = sum(tokens) * flops_per_token(config.model) / rate / 86_400
    unit, per_day = time_unit(days)
    share = sum(t * row.idle for t, row in zip(tokens, idle, strict=True)) / sum(tokens)
    start = busy_start_tokens(config, layout)
    remedy = f"; none with schedule.ramp_start_tokens = {start}" if start else ""
    if start and config.schedule.ramp_increment_tokens:
        # Else the batch would go on growing by what no rank count can share.
        remedy += f" and schedule.ramp_increment_tokens = {start}"
    return (
        f"idle: {share:.0%} of the ranks for {days * per_day:,.2g} {unit} of H100s at "
        f"{UTILISATION:.0%} of their peak, while {layout.data} data ranks cannot share the "
        f"batch evenly{remedy}"
    )


@dataclass(frozen=True, slots=True)
class StageRow:
    """One pipeline stage."""

    blocks: int
    parameters: int
    """Of a rank."""
    share: float
    """Of the work of a forward pass."""


def stage_rows(config: RunConfig, layout: Layout) -> list[StageRow]:
    """The pipeline's stages, the first first."""
    model = padded_model(config, layout)
    bounds, costs = stage_bounds(model, layout.pipeline), layer_costs(model)
    held = stage_parameters(model, layout.pipeline, layout.tensor)
    shares = [sum(costs[first:last]) / sum(costs) for first, last in pairwise(bounds)]
    rows = zip(stage_layers(model, layout.pipeline), held, shares, strict=True)
    return [StageRow(*row) for row in rows]


def stages_as_text(config: RunConfig, layout: Layout) -> str:
    """Pipeline stages: their blocks, parameters on a rank, share of the work; stages that are the
    same in one line."""
    cells: list[Sequence[str]] = [("stage", "blocks", "parameters per rank", "share of work")]
    rows = stage_rows(config, layout)
    first = 0
    for last, row in enumerate(rows):
        if last + 1 < len(rows) and rows[last + 1] == row:
            continue
        name = f"{first}" if first == last else f"{first}-{last}"
        cells.append((name, f"{row.blocks}", f"{row.parameters:,}", f"{row.share:.1%}"))
        first = last + 1
    return aligned(cells)


def aligned(cells: Sequence[Sequence[str]]) -> str:
    """Rows of cells as right-aligned columns."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in cells]
    return "\n".join(lines)
