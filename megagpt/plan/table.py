"""The batch ramp of a run as a table, before anything is trained (L0, stdlib only)."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from megagpt.config import RunConfig
from megagpt.plan.layout import Layout, accumulation_steps, padded_model
from megagpt.plan.stages import layer_costs, stage_bounds, stage_parameters


@dataclass(frozen=True, slots=True)
class Row:
    """Steps in a row with the same batch."""

    first_tokens: int
    """Tokens consumed before them."""
    last_tokens: int
    batch_tokens: int
    n_steps: int
    accumulation: int
    """Forward and backward passes of each rank in a step."""
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
            accumulation=accumulation_steps(config, layout, one.batch_tokens),
            first_lr=schedule.lr(one.first_tokens + one.batch_tokens),
            last_lr=schedule.lr(one.last_tokens),
        )
        for one in schedule.segments
    ]


HEAD = (
    "from tokens",
    "to tokens",
    "batch tokens",
    "steps",
    "passes per rank",
    "first LR",
    "last LR",
)


def as_text(rows: list[Row]) -> str:
    """The rows as aligned columns."""
    cells = [
        HEAD,
        *(
            (
                f"{row.first_tokens:,}",
                f"{row.last_tokens:,}",
                f"{row.batch_tokens:,}",
                f"{row.n_steps:,}",
                f"{row.accumulation:,}",
                f"{row.first_lr:.3e}",
                f"{row.last_lr:.3e}",
            )
            for row in rows
        ),
    ]
    return aligned(cells)


def stages_as_text(config: RunConfig, layout: Layout) -> str:
    """Pipeline stages: their blocks, parameters on a rank, share of the work."""
    model = padded_model(config, layout)
    bounds, costs = stage_bounds(model, layout.pipeline), layer_costs(model)
    held = stage_parameters(model, layout.pipeline, layout.tensor)
    cells: list[Sequence[str]] = [("stage", "blocks", "parameters per rank", "share of work")]
    for stage, (first, last) in enumerate(pairwise(bounds)):
        blocks = len(set(range(first, last)) & set(range(2, 2 + model.n_layer)))
        share = sum(costs[first:last]) / sum(costs)
        cells.append((f"{stage}", f"{blocks}", f"{held[stage]:,}", f"{share:.1%}"))
    return aligned(cells)


def aligned(cells: Sequence[Sequence[str]]) -> str:
    """Rows of cells as right-aligned columns."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in cells]
    return "\n".join(lines)
