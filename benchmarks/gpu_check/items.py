"""What is measured, in the order of what it tells, and how long each item may take.

Limits are seconds on a GPU, twice of what an item is reckoned to need; together they exceed a
call, whose own limit decides how far it comes. On a CPU every shape is tiny and limits grow.
"""

from dataclasses import dataclass

N_CTX = 2048
MICRO_BATCHES = 4
"""Of a training's step, so that accumulating counts as it does in a run."""
TINY_N_CTX = 64
TINY = (
    "model.n_layer=2",
    "model.n_head=2",
    "model.d_model=32",
    f"model.n_ctx={TINY_N_CTX}",
    "model.vocab_size=257",
    "model.band_width=16",
)
"""Overrides that make any run file's model one for a CPU."""


@dataclass(frozen=True)
class Step:
    """Training steps of one model and one micro-batch, doubled to the end of the memory."""

    size: str
    attention: str
    contender: str
    """Of benchmarks/model_step.py."""
    micro_batch: int

    @property
    def name(self) -> str:
        return f"{self.size}-{self.attention.replace(',', '-')}-{self.contender}"


@dataclass(frozen=True)
class Training:
    """A training end to end, `python -m megagpt.train` with a preset's run file."""

    name: str
    size: str
    micro_batch: int
    steps: int
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Item:
    """One process: `python -m benchmarks.gpu_check.MODULE NAME`, or pytest."""

    name: str
    """group.what; the group is also the module."""
    limit_s: int

    @property
    def group(self) -> str:
        return self.name.split(".")[0]


BOTH = "dense,banded"
STEPS = (
    Step("125m", BOTH, "ours+compile", 16),
    Step("1.3b", BOTH, "ours+compile", 8),
    Step("125m", "dense", "nanogpt+compile", 16),
    Step("125m", "dense", "ours+compile", 16),
    Step("350m", BOTH, "ours+compile", 16),
    Step("760m", BOTH, "ours+compile", 8),
    Step("125m", BOTH, "ours", 16),
    Step("1.3b", BOTH, "ours", 8),
    Step("125m", "dense", "ours", 16),
    Step("125m", "dense", "nanogpt", 16),
    Step("350m", BOTH, "ours", 16),
    Step("760m", BOTH, "ours", 8),
    Step("350m", "dense", "ours+compile", 16),
    Step("760m", "dense", "ours+compile", 8),
    Step("1.3b", "dense", "ours+compile", 8),
)
TRAININGS = (
    Training("125m", "125m", 16, 24),
    Training("1.3b", "1.3b", 8, 8),
    Training("125m-zero2", "125m", 16, 6, ("parallel.ds_config=zero2",)),
    Training("125m-zero3", "125m", 16, 6, ("parallel.ds_config=zero3",)),
    Training("125m-fp16", "125m", 16, 6, ("parallel.dtype=fp16",)),
    Training("1.3b-recompute", "1.3b", 8, 4, ("parallel.recompute=full",)),
    Training("125m-offload", "125m", 16, 3, ("parallel.ds_config=zero3_offload",)),
    Training("125m-eager", "125m", 16, 6, ("parallel.compile=false",)),
    Training("125m-deterministic", "125m", 16, 6, ("parallel.deterministic=true",)),
    Training("350m", "350m", 16, 8),
    Training("760m", "760m", 8, 8),
)
MODES = {"deterministic": ("parallel.deterministic=true",), "fast": ()}
"""parallel.deterministic on and off, for the gates of exactness."""
GATES = ("the same run twice", "resumed after a kill", "ZeRO 2 for 1", "ZeRO 3 for 1")

_TRAIN = {t.name: Item(f"train.{t.name}", 75 if "1.3b" in t.name else 50) for t in TRAININGS}
_STEPS = [Item(f"steps.{s.name}", 75 if "1.3b" in s.name else 50) for s in STEPS]
ITEMS = (
    Item("data", 40),
    Item("probe", 70),
    _TRAIN.pop("125m"),
    Item("exact", 80),
    Item("tests", 150),
    _TRAIN.pop("1.3b"),
    *_STEPS[:3],
    *_TRAIN.values(),
    *_STEPS[3:],
)


def chosen(words: list[str]) -> list[Item]:
    """Items by group or full name, in the table's order; `data` comes with what reads it."""
    known = {item.name for item in ITEMS} | {item.group for item in ITEMS}
    wrong = [word for word in words if word not in known]
    if wrong:
        raise SystemExit(f"no item {', '.join(wrong)}; there are {', '.join(sorted(known))}")
    found = [item for item in ITEMS if not words or item.name in words or item.group in words]
    if {"exact", "train"} & {item.group for item in found} and ITEMS[0] not in found:
        found.insert(0, ITEMS[0])
    return found
