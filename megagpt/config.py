"""The run file: what to train, on how much, and how it is split (L0, stdlib only).

    config = load_run("launch/runs/quickstart.toml", ["schedule.peak_lr=1e-3"])

Precedence: a default below < the preset's row (presets.py) < the run file < `section.key=value`.
The tree is frozen; nothing derived is ever written back into it. All problems of a run file are
gathered and raised at once as one UsageError, each with the key, the value, the rule and the
remedy; an unknown key is offered the nearest known one.

TOML allows no key `model` beside a table `[model]`, which is how a run file reads best. The line
`model = "gpt3-125m"` above the first table is therefore read as `preset = "gpt3-125m"`, which may
also be written so.
"""

import dataclasses
import difflib
import json
import re
import tomllib
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megagpt.errors import UsageError
from megagpt.presets import PRESETS, ModelConfig
from megagpt.schedule import Schedule


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSource:
    """A prepared corpus: a folder with a manifest.json."""

    path: str
    weight: float = 1.0
    """Share of the samples; the weights of all sources are normalised to a sum of 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """[data]: what is read."""

    train: tuple[DataSource, ...]
    """Corpora that are trained on, without replacement within an epoch of each."""
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
    """Steps in a row without a finite loss and gradient after which the run saves and stops."""
    spike_action: str = "none"
    """After a step whose loss or gradient norm spikes: none (it is recorded), or rollback: go on
    from the newest checkpoint with the samples that follow the step."""
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


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    """[log]: what the run tells while it goes on."""

    every_steps: int = 1
    """Steps between lines on the console; metrics.jsonl always has every step."""
    tensorboard: bool = True
    """Write TensorBoard events to the run folder."""
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


# --- reading -----------------------------------------------------------------------------------


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a run file and applies `section.key=value` overrides.

    Raises UsageError that lists every problem: a missing or broken file, unknown keys with the
    nearest known ones, values of a wrong type, values that no run can have.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"{path}: cannot read the run file ({error.strerror}); give the path of a .toml file, "
            "for example launch/runs/quickstart.toml"
        ) from None
    return parse_run(text, overrides, name=str(path))


def parse_run(text: str, overrides: Sequence[str] = (), name: str = "run file") -> RunConfig:
    """The same for the text of a run file; `name` stands for it in messages."""
    # Only the part above the first table can hold the top-level line `model = ...`.
    table = re.search(r"(?m)^\s*\[", text)
    end = table.start() if table else len(text)
    head = re.sub(r"(?m)^model(\s*=)", r"preset\1", text[:end])
    try:
        tree = tomllib.loads(head + text[end:])
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{name}: not valid TOML: {error}") from None
    problems: list[str] = []
    for override in overrides:
        _override(tree, override, problems)
    _add_preset(tree, problems)
    config = _build(RunConfig, tree, "", problems)
    # Rules between values are only worth reading once every value is of its type.
    if config is not None and not problems:
        problems = list(_problems(config))
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UsageError(f"{name}: {count}\n" + "\n".join(f"  - {p}" for p in problems))
    assert isinstance(config, RunConfig)
    return config


def _override(tree: dict[str, Any], override: str, problems: list[str]) -> None:
    """Applies one `section.key=value` to the tree; the value is read as TOML, else as text."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        problems.append(f"override {override!r}: must be section.key=value")
        return
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, last = ("preset" if key == "model" else key).split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            problems.append(f"override {override!r}: {section} is not a section")
            return
    tree[last] = value


def _add_preset(tree: dict[str, Any], problems: list[str]) -> None:
    """Lays the sections of the tree over those of its preset's row."""
    name = tree.get("preset", "")
    if name == "":
        return
    if name not in PRESETS:
        near = _nearest(str(name), PRESETS)
        problems.append(f"model = {name!r}: no such preset{near}; presets: {', '.join(PRESETS)}")
        return
    row = PRESETS[name]
    model = dataclasses.asdict(row.model)
    for section, defaults in (
        ("model", model),
        ("schedule", row.schedule),
        ("optimizer", row.optimizer),
    ):
        if isinstance(tree.setdefault(section, {}), dict):
            tree[section] = {**defaults, **tree[section]}


def _nearest(word: str, known: typing.Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _build(cls: type, tree: Any, where: str, problems: list[str]) -> Any:
    """An instance of dataclass `cls` from a table, or None with the reasons added to `problems`."""
    label = where.rstrip(".") or "the run file"
    if not isinstance(tree, dict):
        problems.append(f"{label} = {tree!r}: must be a table of keys")
        return None
    fields = {f.name: f for f in dataclasses.fields(cls)}
    # The synonym under which users know the top-level key.
    known = [*fields, "model"] if cls is RunConfig else list(fields)
    for key in tree.keys() - fields.keys():
        choices = ", ".join(sorted(set(known)))
        problems.append(f"unknown key {where + key!r}{_nearest(key, known)}; known: {choices}")
    hints = typing.get_type_hints(cls)
    before, values = len(problems), {}
    for name, spec in fields.items():
        if name in tree:
            values[name] = _value(hints[name], tree[name], where + name, problems)
        elif dataclasses.is_dataclass(hints[name]) and spec.default_factory is dataclasses.MISSING:
            values[name] = _build(hints[name], {}, f"{where}{name}.", problems)
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            problems.append(f"missing key {where + name!r}: the run file must say it")
    return cls(**values) if len(problems) == before else None


def _value(hint: Any, value: Any, where: str, problems: list[str]) -> Any:
    """`value` as the type `hint`, or None with the reason added to `problems`."""
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where + ".", problems)  # type: ignore[arg-type]
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            problems.append(f"{where} = {value!r}: must be a list")
            return None
        inner = typing.get_args(hint)
        if inner[-1] is not Ellipsis and len(value) != len(inner):
            problems.append(f"{where} = {value!r}: must be a list of {len(inner)} values")
            return None
        return tuple(_value(inner[0], v, f"{where}[{i}]", problems) for i, v in enumerate(value))
    if hint is float and type(value) is int:
        return float(value)
    if hint is int and type(value) is float and value.is_integer():
        return int(value)
    if type(value) is not hint:
        kind = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[hint]
        problems.append(f"{where} = {value!r}: must be {kind}")
        return None
    return value


# --- rules between values -----------------------------------------------------------------------


def _problems(config: RunConfig) -> typing.Iterator[str]:
    """Everything that no layout could repair; the layout's own rules stand in megagpt.plan."""
    for section, key in (
        *(("model", k) for k in ("n_layer", "n_head", "d_model", "n_ctx", "vocab_size")),
        *(("model", k) for k in ("vocab_multiple", "band_width")),
        *(("parallel", k) for k in ("micro_batch", "pipeline", "tensor", "recompute_every")),
        ("checkpoint", "keep_last"),
        ("evaluate", "batches"),
        ("optimizer", "max_skipped_steps"),
        ("optimizer", "spike_window"),
        ("log", "every_steps"),
    ):
        value = getattr(getattr(config, section), key)
        if value < 1:
            yield f"{section}.{key} = {value}: must be 1 or more"
    for section, key in (
        ("checkpoint", "stop_after_minutes"),
        ("checkpoint", "stop_after_steps"),
        ("log", "watchdog_minutes"),
        ("log", "check_replicas_every_steps"),
    ):
        value = getattr(getattr(config, section), key)
        if not 0 <= value < float("inf"):
            yield f"{section}.{key} = {value}: must be 0 (off) or more"
    if not config.optimizer.spike_threshold > 0:
        yield f"optimizer.spike_threshold = {config.optimizer.spike_threshold}: must be above 0"
    for section, key, allowed in (
        ("parallel", "dtype", ("bf16", "fp16", "fp32")),
        ("parallel", "recompute", ("none", "full")),
        ("checkpoint", "on_failure", ("stop", "continue")),
        ("optimizer", "spike_action", ("none", "rollback")),
    ):
        value = getattr(getattr(config, section), key)
        if value not in allowed:
            yield f"{section}.{key} = {value!r}: must be one of {', '.join(allowed)}"
    yield from _model_problems(config.model)
    yield from config.schedule.problems()
    yield from _batch_problems(config.schedule, config.model.n_ctx)
    yield from _data_problems(config.data)


def _model_problems(model: ModelConfig) -> typing.Iterator[str]:
    if model.n_head > 0 and model.d_model % model.n_head:
        yield (
            f"model.d_model = {model.d_model}: must be a multiple of n_head ({model.n_head}), so "
            "that every head has the same width"
        )
    if model.family not in ("gpt2", "gpt1", "igpt"):
        yield f"model.family = {model.family!r}: must be gpt2 (GPT-2 and GPT-3), gpt1 or igpt"
    if not model.attention or set(model.attention) - {"dense", "banded"}:
        yield f'model.attention = {list(model.attention)}: must list "dense" and "banded"'
    if not 0.0 <= model.dropout < 1.0:
        yield f"model.dropout = {model.dropout}: must be at least 0 and less than 1"


def _batch_problems(schedule: Schedule, n_ctx: int) -> typing.Iterator[str]:
    for key, tokens in (
        ("batch_tokens", schedule.batch_tokens),
        ("ramp_start_tokens", schedule.start_tokens),
        ("ramp_increment_tokens", schedule.increment_tokens),
    ):
        if n_ctx > 0 and tokens > 0 and tokens % n_ctx:
            yield (
                f"schedule.{key} = {tokens}: must be a multiple of model.n_ctx ({n_ctx}), the "
                "tokens of one sequence"
            )


def _data_problems(data: DataConfig) -> typing.Iterator[str]:
    if not data.train:
        yield "data.train = []: must name at least one folder of shards"
    for kind in ("train", "validation"):
        for source in getattr(data, kind):
            if source.weight <= 0:
                yield f"data.{kind}: weight = {source.weight} of {source.path}: must be above 0"


# --- writing ------------------------------------------------------------------------------------


def dump_run(config: RunConfig) -> str:
    """The whole configuration as the text of a run file that load_run reads back to the same."""
    tables = dataclasses.asdict(config)
    lines = [f"{k} = {_toml(v)}" for k, v in tables.items() if not isinstance(v, dict)]
    for name, table in tables.items():
        if isinstance(table, dict):
            lines += ["", f"[{name}]", *(f"{k} = {_toml(v)}" for k, v in table.items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    """One value as TOML. JSON's strings, numbers and booleans are TOML's too."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    return json.dumps(value, ensure_ascii=False)
