"""The tables of a run file and their keys: type, default, meaning (L0, stdlib only)."""

from dataclasses import dataclass, field

from megagpt.config.presets import ModelConfig
from megagpt.config.schedule import Schedule


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSource:
    """A prepared corpus: a folder with a manifest.json."""

    path: str
    weight: float = 1.0
    """Share of the samples; the weights of all sources are normalised to a sum of 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureChange:
    """[[data.changes]]: other weights from a point of the run on."""

    at_tokens: int
    """Tokens of the data order that come before it, a multiple of model.n_ctx."""
    weights: tuple[float, ...]
    """One for each corpus of data.train in its order; 0: it rests."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """[data]: what is read."""

    train: tuple[DataSource, ...]
    """Corpora that are trained on, without replacement within an epoch of each."""
    changes: tuple[MixtureChange, ...] = ()
    """Changes of their weights in mid-run, in the order in which they come."""
    validation: tuple[DataSource, ...] = ()
    """Corpora that are only evaluated; none: no validation loss."""
    verify: bool = True
    """Compare every shard with its checksum before training (each file once per run folder)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """[optimizer]: AdamW, as GPT-3's Appendix B unless the preset says otherwise."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the first and second moment."""
    eps: float = 1.0e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on matrices only (see megagpt.model.decays)."""
    gradient_clipping: float = 1.0
    """Largest global gradient norm; 0: no clipping."""
    max_skipped_steps: int = 20
    """Steps in a row whose update was left out (loss or gradient not finite, or a spike under
    spike_action = "skip") after which the run saves and stops."""
    spike_action: str = "none"
    """What is done about a step whose loss or gradient norm spikes: none (it is recorded), skip
    (its update is left out), or rollback: go on from the newest checkpoint with the samples that
    follow the step."""
    spike_window: int = 128
    """Steps that a step is compared with."""
    spike_threshold: float = 8.0
    """Robust standard deviations (1.4826 MAD) above their median that make a spike."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """[parallel]: how the run is split over ranks; none of it changes the result."""

    ds_config: str = "zero1"
    """A file of ds_configs/ by name, or a path to one."""
    micro_batch: int = 1
    """Sequences for each rank and forward pass."""
    pipeline: int = 1
    """Pipeline stages."""
    tensor: int = 1
    """Ranks that share each layer's matrices."""
    recompute: str = "none"
    """none, or full: activations of every block are computed again in the backward pass."""
    recompute_every: int = 1
    """With recompute = "full": only every k-th block."""
    dtype: str = "bf16"
    """bf16, fp16 or fp32: weights and activations; masters and moments are always fp32."""
    compile: bool = False
    """Pass the model through torch.compile (falls back with a warning where none exists)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """[checkpoint]: when the run is saved."""

    every_tokens: int = 1_000_000_000
    """Tokens between checkpoints; 0: only at the end and when asked to stop."""
    keep_last: int = 2
    """Newest checkpoints that are kept."""
    keep_every_tokens: int = 0
    """The first checkpoint past each multiple of this is kept for ever; 0: none."""
    background: bool = True
    """Write while training goes on; costs a copy of weights and moments in the host's memory."""
    on_failure: str = "stop"
    """When a checkpoint cannot be written (a full disk): stop (exit 3), or continue training."""
    stop_after_minutes: float = 0.0
    """Minutes from the start of the command in which it saves and ends (exit 75); 0: no limit.
    SLURM's own end of the job is kept in any case."""
    stop_after_steps: int = 0
    """Steps after which a start of the command saves and ends (exit 75); 0: no limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """[evaluate]: the validation loss within the run."""

    every_tokens: int = 1_000_000_000
    """Tokens between evaluations; 0: only before the first and after the last step."""
    batches: int = 8
    """Batches of the schedule's increment (schedule.ramp_increment_tokens) that are evaluated."""
    samples: int = 0
    """Texts that the model writes at each evaluation, for samples/ and TensorBoard; 0: none. All
    weights go to rank 0 for them, in fp32, so that suits models which one device holds."""
    sample_tokens: int = 64
    """Length of each at most."""
    prompt: str = ""
    """How each begins; empty: as a document does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    """[log]: what the run tells while it goes on."""

    every_steps: int = 1
    """Steps between lines on the console; metrics.jsonl always has every step."""
    tensorboard: bool = True
    """Write TensorBoard events to the run folder."""
    wandb: str = ""
    """Project of Weights & Biases that is told the same as TensorBoard; empty: none."""
    details_every_steps: int = 100
    """Steps between closer looks: every layer's norms (weights, gradient, update) and activations,
    and the gradient noise scale; 0: never."""
    profile_steps: tuple[int, ...] = ()
    """[first, last]: steps whose operations are profiled, counted from 1; empty: none."""
    watchdog_minutes: float = 30.0
    """Minutes in which a step must end (four times as many for the start, the first step, an
    evaluation, a checkpoint), or the job ends with its stacks in the run folder; 0: no limit."""
    check_replicas_every_steps: int = 100
    """Steps between comparisons of the weights that data-parallel ranks share; 0: never."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One run: with the data it names and its seed, this decides every weight."""

    preset: str = ""
    """A row of presets.py, the source of defaults for [model], [schedule] and [optimizer]."""
    seed: int = 1337
    """Decides the initial weights, the data order and dropout."""
    output: str
    """The run folder; training again with the same folder resumes."""
    model: ModelConfig
    data: DataConfig
    schedule: Schedule
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    log: LogConfig = field(default_factory=LogConfig)
