"""A run that two ranks have trained, and a real engine to load it into."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from megagpt.config import RunConfig, load_run
from megagpt.engine import Engine, Ranks, build_engine
from megagpt.plan.ds_config import read_ds_config, resolve
from megagpt.plan.layout import Layout
from tests.lib.distributed import group_of_one, undisturbed


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with the checkpoints of a run by two ranks, to be damaged at will."""
    shutil.copytree(undisturbed() / "run" / "checkpoints", tmp_path / "run" / "checkpoints")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def config() -> RunConfig:
    """What it was trained with."""
    return load_run(undisturbed() / "run.toml")


@pytest.fixture(scope="module")
def engine(config: RunConfig) -> Iterator[Engine]:
    """A real engine of one process, with DeepSpeed."""
    ds_config = resolve(config, Layout(), read_ds_config("zero1"))
    with group_of_one():
        made = build_engine(config, Layout(), Ranks(), ds_config)
        yield made
        made.close()
