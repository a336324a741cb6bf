"""A run fitted to a corpus, a size and a machine: each number with its rule (L3: numpy, no torch).

1) The size is a preset or one of SIZES; its vocabulary is that of the corpus.
2) The context is the size's, halved until the corpus gives enough windows.
3) The tokens are as asked for; else on GPUs 20 a parameter (Hoffmann et al. 2022), on a CPU what
   it reads in the given minutes; a preset reads a corpus four times at most (Muennighoff et al.
   2023), one of SIZES ten times.
4) The batch is the size's, halved until the run has some hundred steps; warm-up, decay and ramp
   keep the share of the tokens that the preset gives them.
5) The layout is the simplest of those that the planner finds about as fast as the fastest.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from megagpt.config import ModelConfig, RunConfig
from megagpt.config.flops import flops_per_token, parameters
from megagpt.config.presets import PRESETS
from megagpt.config.schedule import Schedule
from megagpt.config.sections import DataConfig, DataSource, OptimizerConfig, ParallelConfig
from megagpt.corpus.manifest import CorpusManifest
from megagpt.errors import UsageError
from megagpt.plan.candidates import Cluster
from megagpt.plan.judge import Judgement, search, what_works
from megagpt.plan.layout import busy_start_tokens, layout_of
from megagpt.plan.sanity import MOST_EPOCHS

SIZES = {
    #       layers, heads, width, context, peak learning rate
    "nano": (4, 4, 128, 128, 3e-3),
    "mini": (6, 4, 256, 256, 1.5e-3),
    "small": (8, 8, 512, 256, 1e-3),
}
"""Shapes for a CPU or a quick try, beside the presets; the learning rates are ours."""
SEQUENCES = 16
"""Of their full batch."""
CORE_FLOPS = 20e9
"""FLOP/s that a CPU core is taken to reach on a whole training step in fp32."""
MINUTES = 10.0
"""Of training on a CPU, where no tokens are asked for."""
TOKENS_PER_PARAMETER = 20
"""Hoffmann et al. 2022: what trains a size best for its compute."""
SMALL_EPOCHS = 10
"""Of SIZES: a small text is read more often, and the validation loss tells when it is enough."""
NEAR = 1.1
"""Times the fastest step that is as good."""
LEAST_SEQUENCES = 4
LEAST_STEPS = 400
LEAST_CONTEXT = 32
LEAST_WINDOWS = (64, 8)
"""Windows of context that the training and validation corpus must give."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """What is asked for; 0 and "" where nothing is."""

    size: str = ""
    tokens: int = 0
    minutes: float = MINUTES


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitted:
    """A run file's values, and what they were taken from."""

    size: str
    config: RunConfig
    epochs: float
    why_tokens: str
    judged: Judgement | None
    """The planner's word on it; None on a CPU."""


def fit(
    corpora: Sequence[CorpusManifest],
    validation: CorpusManifest | None,
    machine: Cluster | int,
    output: str,
    wish: Wish,
) -> Fitted:
    """The run; `machine` is a cluster of GPUs or the cores of a CPU.

    Raises UsageError for an unknown size, a corpus too small for it, and where nothing fits.
    """
    there = sum(corpus.tokens for corpus in corpora)
    size = wish.size or _size(there, machine)
    model, schedule, optimizer = _row(size, corpora[0].vocab_size)
    if corpora[0].record_start >= 0:  # images
        model = dataclasses.replace(model, family="igpt")
    held = (validation,) if validation else ()
    held_out = sum(corpus.tokens for corpus in held)
    n_ctx = _of_records((*corpora, *held)) or _context(model.n_ctx, there, held_out)
    if there < (least := LEAST_WINDOWS[0] * n_ctx):
        raise UsageError(
            f"{corpora[0].folder}: {there:,} tokens are too few to train on; prepare a corpus of "
            f"{least:,} at least"
        )
    model = dataclasses.replace(model, n_ctx=n_ctx)
    tokens, why = _tokens(size, model, there, machine, wish)
    ranks = 1 if isinstance(machine, int) else machine.gpus
    source = tuple(
        DataSource(path=str(corpus.folder), weight=round(corpus.tokens / there, 4))
        for corpus in corpora
    )
    config = RunConfig(
        preset=size if size in PRESETS else "",
        output=output,
        model=model,
        data=DataConfig(
            train=source, validation=tuple(DataSource(path=str(one.folder)) for one in held)
        ),
        schedule=_schedule(schedule, model.n_ctx, tokens, ranks),
        optimizer=optimizer,
        parallel=ParallelConfig(dtype="fp32" if isinstance(machine, int) else "bf16"),
    )
    if isinstance(machine, int):
        # Several ranks take smaller ones by themselves, a half each for two.
        micro = min(SEQUENCES, config.schedule.batch_tokens // config.model.n_ctx)
        parallel = dataclasses.replace(config.parallel, micro_batch=micro)
        config, judged = dataclasses.replace(config, parallel=parallel), None
    else:
        config, judged = _laid_out(config, machine)
    return Fitted(
        size=size,
        config=config,
        epochs=config.schedule.total_tokens / there,
        why_tokens=why,
        judged=judged,
    )


def _size(there: int, machine: Cluster | int) -> str:
    """Where none is asked for: what a CPU trains in minutes, and on GPUs what the corpus feeds."""
    if isinstance(machine, int):
        return "nano"
    rows = ("gpt3-125m", "gpt3-350m", "gpt3-760m", "gpt3-1.3b")
    most = MOST_EPOCHS * there / TOKENS_PER_PARAMETER
    fed = [name for name in rows if parameters(PRESETS[name].model) <= most]
    return (["small", *fed])[-1]


def _row(size: str, vocabulary: int) -> tuple[ModelConfig, Schedule, OptimizerConfig]:
    """Model, schedule and optimizer of a size, with the corpus's vocabulary."""
    if row := PRESETS.get(size):
        model = dataclasses.replace(row.model, vocab_size=vocabulary)
        return model, Schedule(**row.schedule), OptimizerConfig(**row.optimizer)  # type: ignore[arg-type]
    if size not in SIZES:
        raise UsageError(f"--size {size}: must be one of {', '.join([*SIZES, *PRESETS])}")
    layers, heads, width, n_ctx, rate = SIZES[size]
    model = ModelConfig(
        n_layer=layers, n_head=heads, d_model=width, n_ctx=n_ctx, vocab_size=vocabulary
    )
    batch = SEQUENCES * n_ctx
    return model, Schedule(total_tokens=1, peak_lr=rate, batch_tokens=batch), OptimizerConfig()


def _of_records(corpora: Sequence[CorpusManifest]) -> int:
    """The context of which a record is one window; 0 where there are documents alone."""
    lengths = {corpus.record_length: corpus.folder for corpus in corpora if corpus.record_length}
    if len(lengths) > 1:
        told = ", ".join(f"{folder} of {length} tokens" for length, folder in lengths.items())
        raise UsageError(f"--data: {told}: records of a run have one length; prepare some again")
    return next(iter(lengths), 1) - 1


def _context(most: int, there: int, held_out: int) -> int:
    """The largest halving of the size's context of which the corpora hold enough windows."""
    n_ctx = most
    train, validation = LEAST_WINDOWS
    while n_ctx > LEAST_CONTEXT and (there < train * n_ctx or 0 < held_out < validation * n_ctx):
        n_ctx //= 2
    return n_ctx


def _tokens(
    size: str, model: ModelConfig, there: int, machine: Cluster | int, wish: Wish
) -> tuple[int, str]:
    """Tokens to train on, and where the number comes from."""
    if wish.tokens:
        return wish.tokens, "as asked for"
    if isinstance(machine, int):
        tokens = wish.minutes * 60 * machine * CORE_FLOPS / flops_per_token(model)
        minutes = f"{wish.minutes:g} minute{'s' * (wish.minutes != 1)}"
        why = f"about {minutes} on {machine} CPU core{'s' * (machine > 1)}"
    else:
        tokens, why = TOKENS_PER_PARAMETER * parameters(model), "20 a parameter"
    epochs = MOST_EPOCHS if size in PRESETS else SMALL_EPOCHS
    if tokens > epochs * there:
        return round_down(epochs * there), f"{epochs} at most"
    return round_down(tokens), why


def round_down(number: float, figures: int = 2) -> int:
    """Its first figures."""
    unit = 10 ** max(0, int(math.log10(max(number, 1))) + 1 - figures)
    return max(1, int(number // unit * unit))


def _schedule(row: Schedule, n_ctx: int, tokens: int, ranks: int) -> Schedule:
    """The row's schedule on so many tokens."""
    share, unit = tokens / row.total_tokens if row.warmup_tokens else 0.0, n_ctx * ranks
    batch = max(row.batch_tokens // n_ctx, LEAST_SEQUENCES) * n_ctx
    least = max(unit, LEAST_SEQUENCES * n_ctx)
    while batch > least and batch % (2 * n_ctx) == 0 and tokens < LEAST_STEPS * batch:
        batch //= 2
    # Every data rank has a sequence of each step.
    batch = -(-batch // unit) * unit
    ramp = round_down(row.ramp_tokens * share) if row.ramp_tokens else 0
    start = row.ramp_start_tokens // n_ctx * n_ctx
    ramps = ramp > 20 * batch and 0 < start < batch and batch % start == 0
    return dataclasses.replace(
        row,
        total_tokens=tokens,
        # Four hundredths where the paper's share would be a handful of steps.
        warmup_tokens=round_down(min(max(row.warmup_tokens * share, 100 * batch), tokens / 25), 3),
        decay_tokens=round_down(row.decay_tokens * share) if row.decay_tokens else 0,
        batch_tokens=batch,
        ramp_start_tokens=start if ramps else 0,
        ramp_tokens=ramp if ramps else 0,
    )


def _laid_out(config: RunConfig, cluster: Cluster) -> tuple[RunConfig, Judgement]:
    """The run in a layout that fits, its ramp begun where every data rank has work."""
    found = _simplest(config, cluster)
    if not found:
        raise UsageError(what_works(config, cluster))
    laid = found.candidate.config
    start = busy_start_tokens(laid, layout_of(laid, cluster.gpus))
    if laid.schedule.ramp_tokens and start != laid.schedule.start_tokens:
        start = 0 if start is None or start >= laid.schedule.batch_tokens else start
        ramp = laid.schedule.ramp_tokens if start else 0
        schedule = dataclasses.replace(laid.schedule, ramp_start_tokens=start, ramp_tokens=ramp)
        found = _simplest(dataclasses.replace(config, schedule=schedule), cluster) or found
        laid = found.candidate.config
    return laid, found


def _simplest(config: RunConfig, cluster: Cluster) -> Judgement | None:
    """Of the layouts about as fast as the fastest, the one with the least machinery; None where
    nothing fits. Predictions are not so exact, and under ZeRO-3 nothing is compiled."""
    found = search(config, cluster)
    near = [one for one in found if one.step <= NEAR * found[0].step]

    def machinery(one: Judgement) -> tuple[object, ...]:
        layout, parallel = one.candidate.layout, one.candidate.config.parallel
        return (layout.tensor, layout.pipeline, one.candidate.zero, parallel.recompute, one.step)

    return min(near, key=machinery, default=None)
