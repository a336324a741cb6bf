"""The tables of a run file: each key's type, bound, default and meaning, and the rules between
keys (L0).

parse.py holds a run file against the annotations and prints a key's sentence with its problem, so
that a new key needs nothing but its lines here. Every number is finite and fits TOML's 64 bits.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Interval, MinLen

from megagpt.config.bounds import FileName, Line, Minutes, OneOrMore, Size, ZeroOrMore, around
from megagpt.config.presets import ModelConfig
from megagpt.config.schedule import Schedule


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSource:
    """A prepared corpus: a folder with a manifest.json."""

    path: FileName
    weight: Annotated[float, Ge(0)] = 1.0
    """Share of the samples; the weights of all sources are normalised to a sum of 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureChange:
    """[[data.changes]]: other weights from a point of the run on."""

    at_tokens: OneOrMore
    """Tokens of the data order that come before it, a multiple of model.n_ctx."""
    weights: tuple[Annotated[float, Ge(0)], ...]
    """One for each corpus of data.train in its order; 0: it rests."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """[data]: what is read."""

    train: Annotated[tuple[DataSource, ...], MinLen(1)]
    """Corpora that are trained on, without replacement within an epoch of each."""
    changes: tuple[MixtureChange, ...] = ()
    """Changes of their weights in mid-run, in the order in which they come."""
    flip: bool = False
    """Images alone: mirror half of the samples left to right, drawn by seed and sample number."""
    shift: ZeroOrMore = 0
    """Images alone: move each sample by up to so many pixels in both directions, its edge mirrored,
    drawn by seed and sample number."""
    validation: tuple[DataSource, ...] = ()
    """Corpora that are only evaluated; none: no validation loss."""
    verify: bool = True
    """Compare every shard with its checksum before training (each file once per run folder)."""

    def problems(self) -> Iterator[str]:
        """What makes this mixture impossible."""
        for kind in ("train", "validation"):
            for index, source in enumerate(getattr(self, kind)):
                weights = [source.weight]
                if kind == "train":
                    # A corpus may rest at first and join with a change.
                    weights += [w for c in self.changes for w in c.weights[index : index + 1]]
                if not any(weights):
                    yield f"data.{kind}: weight = {source.weight} of {source.path}: must be above 0"
        if not any(source.weight for source in self.train):
            yield "data.train: every weight is 0; one must be above 0 where the run begins"
        begin = 0
        for index, change in enumerate(self.changes):
            key = f"data.changes[{index}]"
            if change.at_tokens <= begin:
                yield (
                    f"{key}.at_tokens = {change.at_tokens}: must be above {begin}, where the last "
                    "weights begin"
                )
            if len(change.weights) != len(self.train):
                yield (
                    f"{key}.weights = {list(change.weights)}: must be {len(self.train)} numbers, "
                    "one for each corpus of data.train in its order"
                )
            if not any(change.weights):
                yield f"{key}.weights = {list(change.weights)}: one of them must be above 0"
            begin = change.at_tokens


Dtype = Literal["bf16", "fp16", "fp32"]
DecayRate = Annotated[float, Interval(ge=0, lt=1)]


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """[optimizer]: AdamW, as GPT-3's Appendix B unless the preset says otherwise."""

    betas: tuple[DecayRate, DecayRate] = (0.9, 0.95)
    """Decay rates of the first and second moment."""
    eps: Annotated[float, Gt(0)] = 1.0e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Ge(0)] = 0.1
    """Decoupled weight decay, on matrices only (see megagpt.model.decays)."""
    gradient_clipping: Annotated[float, Ge(0)] = 1.0
    """Largest global gradient norm; 0: no clipping."""
    max_skipped_steps: OneOrMore = 20
    """Steps in a row whose update was left out (loss or gradient not finite, or a spike under
    spike_action = "skip") after which the run ends, with nothing saved (exit code 4)."""
    spike_action: Literal["none", "skip", "rollback"] = "none"
    """What is done about a step whose loss or gradient norm spikes: none (it is recorded), skip
    (its update is left out), or rollback: go on from the newest checkpoint with the samples that
    follow the step."""
    spike_window: OneOrMore = 128
    """Steps that a step is compared with."""
    spike_threshold: Annotated[float, Gt(0)] = 8.0
    """Robust standard deviations (1.4826 MAD) above their median that make a spike."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """[parallel]: how the run is split over ranks; none of it changes the result."""

    ds_config: FileName = "zero1"
    """A file of ds_configs/ by name, or a path to one."""
    micro_batch: Size = 1
    """Sequences for each rank and forward pass, at most: each step takes the largest number that
    divides a data rank's share of it."""
    pipeline: Size = 1
    """Pipeline stages."""
    tensor: Size = 1
    """Ranks that share each layer's matrices."""
    recompute: Literal["none", "full"] = "none"
    """none, or full: activations of every block are computed again in the backward pass."""
    recompute_every: Size = 1
    """With recompute = "full": only every k-th block."""
    dtype: Dtype = "bf16"
    """bf16, fp16 or fp32: weights and activations; masters and moments are always fp32."""
    compile: Literal["auto", True, False] = "auto"
    """torch.compile: auto (on CUDA each block, on a CPU nothing), true or false; where there is no
    compiler, and under ZeRO-3, nothing is compiled, with a warning."""
    deterministic: bool = False
    """Use only kernels that give the same bits in every run of the same layout; costs speed on
    CUDA, and nothing on a CPU, whose kernels are of that kind."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """[checkpoint]: when the run is saved."""

    every_tokens: ZeroOrMore = 1_000_000_000
    """Tokens between checkpoints; 0: only at the end and when asked to stop."""
    keep_last: OneOrMore = 2
    """Newest checkpoints that are kept."""
    keep_every_tokens: ZeroOrMore = 0
    """The first checkpoint at or past each multiple of this is kept for ever; 0: none."""
    background: bool = True
    """Write while training goes on; costs a copy of weights and moments in the host's memory."""
    on_failure: Literal["stop", "continue"] = "stop"
    """When a checkpoint cannot be written (a full disk): stop (exit 3), or continue training."""
    stop_after_minutes: Minutes = 0.0
    """Minutes from the start of the command in which it saves and ends (exit 75); 0: no limit.
    SLURM's own end of the job is kept in any case."""
    stop_after_steps: ZeroOrMore = 0
    """Steps after which a start of the command saves and ends (exit 75); 0: no limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """[evaluate]: the validation loss within the run."""

    every_tokens: ZeroOrMore = 1_000_000_000
    """Tokens between evaluations; 0: only before the first and after the last step."""
    batches: OneOrMore = 8
    """Batches of the schedule's increment (schedule.ramp_increment_tokens) that are evaluated."""
    samples: ZeroOrMore = 0
    """Texts that the model writes at each evaluation, or images that it draws and completes, for
    samples/ and TensorBoard; 0: none. All weights go to rank 0 for them, in fp32, so that suits
    models which one device holds."""
    sample_tokens: Size = 64
    """Length of each at most."""
    prompt: str = ""
    """How each begins; empty: as a document does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    """[log]: what the run tells while it goes on."""

    every_steps: OneOrMore = 1
    """Steps between lines on the console; metrics.jsonl always has every step."""
    tensorboard: bool = True
    """Write TensorBoard events to the run folder."""
    wandb: Line = ""
    """Project of Weights & Biases that is told the same as TensorBoard; empty: none."""
    details_every_steps: ZeroOrMore = 100
    """Steps between per-layer statistics: norms of weights, gradient and update, and activations,
    and the gradient noise scale; 0: never."""
    profile_steps: tuple[ZeroOrMore, ...] = ()
    """[first, last]: steps whose operations are profiled, counted from 1; empty: none."""
    watchdog_minutes: Minutes = 30.0
    """Minutes in which a step must end (four times as many for the start, the first step, an
    evaluation, a checkpoint), or the job ends with its stacks in the run folder; 0: no limit."""
    meeting_minutes: Minutes = 0.0
    """Minutes that a rank which has come waits for the others before it names those missing: more
    where thousands of processes import from a cold file system; 0: 10, or watchdog_minutes if that
    is less."""
    check_replicas_every_steps: ZeroOrMore = 100
    """Steps between comparisons of the weights that data-parallel ranks share; 0: only before a
    checkpoint, as in any case."""

    def problems(self) -> Iterator[str]:
        """What makes this range of profiled steps impossible."""
        steps = self.profile_steps
        if steps and not (len(steps) == 2 and 1 <= steps[0] <= steps[1]):
            yield (
                f"log.profile_steps = {list(steps)}: must be two steps, the first at least 1 and "
                "the last not before it"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One run: with the data it names and its seed, this decides every weight."""

    __pydantic_config__: ClassVar = {
        "strict": True,
        "extra": "forbid",
        "allow_inf_nan": False,
        "use_attribute_docstrings": True,
    }
    preset: str = ""
    """A row of presets.py, the source of defaults for [model], [schedule] and [optimizer]."""
    seed: ZeroOrMore = 1337
    """Decides the initial weights, the data order and dropout."""
    init_from: Line = ""
    """Weights that the run starts from: a run folder, a checkpoint, or a folder that consolidate or
    import wrote; empty: drawn from the seed. Read once, before the first step."""
    output: FileName
    """The run folder; training again with the same folder resumes."""
    model: ModelConfig
    data: DataConfig
    schedule: Schedule
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def problems(self) -> Iterator[str]:
        """Everything that no layout could repair; the layout's own rules stand in megagpt.plan."""
        yield from self.model.problems()
        yield from self.schedule.problems(self.model.n_ctx)
        yield from self.data.problems()
        yield from self.log.problems()
        n_ctx = self.model.n_ctx
        for index, change in enumerate(self.data.changes):
            if change.at_tokens % n_ctx:
                yield (
                    f"data.changes[{index}].at_tokens = {change.at_tokens}: must be a multiple of "
                    f"model.n_ctx ({n_ctx}), the tokens of one sequence; use "
                    f"{around(change.at_tokens, n_ctx)}"
                )
