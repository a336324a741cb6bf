"""The run file: what to train, on how much, and how it is split (L0).

    config = load_run("launch/runs/quickstart.toml", ["schedule.peak_lr=1e-3"])

Precedence: a default below < the preset's row (presets.py) < the run file < `section.key=value`.
The tree is frozen; nothing derived is ever written back into it. All problems of a run file are
gathered and raised at once as one UsageError, each with the key, the value, the rule and the
remedy; an unknown key is offered the nearest known one.

TOML allows no key `model` beside a table `[model]`, which is how a run file reads best. The line
`model = "gpt3-125m"` above the first table is therefore read as `preset = "gpt3-125m"`, which may
also be written so.
"""

from megagpt.config.parse import add_overrides, dump_run, load_run, parse_run
from megagpt.config.presets import ModelConfig
from megagpt.config.sections import (
    CheckpointConfig,
    DataConfig,
    DataSource,
    Dtype,
    EvaluateConfig,
    LogConfig,
    MixtureChange,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
)

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "DataSource",
    "Dtype",
    "EvaluateConfig",
    "LogConfig",
    "MixtureChange",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RunConfig",
    "add_overrides",
    "dump_run",
    "load_run",
    "parse_run",
]
