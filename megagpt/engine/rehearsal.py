"""What a rank builds before its first step, on the meta device and without the other ranks (L2).

A process group of torch's "fake" backend stands for them: it has the run's size and does nothing.
DeepSpeed reads its configuration and cuts the pipeline as on the real ranks; no weight is filled,
so a rank of a 175B run is built in a second on a laptop.
"""

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megagpt.config import RunConfig
from megagpt.engine.slices import OwnedParameter
from megagpt.engine.tensor import TensorGroup, tensor_parts
from megagpt.errors import UsageError
from megagpt.model import GPT
from megagpt.plan.layout import Layout, padded_model
from megagpt.plan.stages import stage_parameters


@dataclass(frozen=True, slots=True)
class Rehearsed:
    """A rank that was built."""

    rank: int
    stage: int
    tensor_rank: int
    n_parameters: int
    """On the rank, before ZeRO shares them out."""
    layers: tuple[str, ...]
    """Canonical names of its layers; the last stage's copy of the embedding is left out."""


def kinds_of_ranks(layout: Layout) -> list[int]:
    """A rank of each pipeline stage and tensor part; data ranks build what the first one does."""
    return [rank for rank in range(layout.world) if layout.data_rank(rank) == 0]


def rehearse(
    config: RunConfig, layout: Layout, ds_config: dict[str, Any], ranks: Sequence[int]
) -> Iterator[Rehearsed]:
    """Builds each of the ranks. Raises UsageError for what DeepSpeed refuses.

    The process must not be in a process group.
    """
    held = stage_parameters(padded_model(config, layout), layout.pipeline, layout.tensor)
    for rank in ranks:
        with _stand_in(rank, layout.world), torch.device("meta"):
            try:
                named = _named(config, layout, ds_config, rank)
            except (ValueError, AssertionError, KeyError, RuntimeError) as error:
                raise UsageError(
                    f"parallel.ds_config = {config.parallel.ds_config!r}, rank {rank} of {layout}: "
                    f"DeepSpeed refuses it: {error}"
                ) from None
        stage, count = layout.stage(rank), sum(one.parameter.numel() for one in named)
        assert count == held[stage], (rank, count, held[stage])
        layers = dict.fromkeys(_layer(one.name) for one in named)
        if stage > 0:
            layers.pop("wte", None)
        yield Rehearsed(rank, stage, layout.tensor_rank(rank), count, tuple(layers))


def _layer(name: str) -> str:
    """The layer of a parameter: h.3.mlp.c_fc.weight -> h.3."""
    return ".".join(name.split(".")[: 2 if name.startswith("h.") else 1])


def _named(
    config: RunConfig, layout: Layout, ds_config: dict[str, Any], rank: int
) -> list[OwnedParameter]:
    """The parameters of a rank, once DeepSpeed has read its configuration."""
    from deepspeed.runtime.config import DeepSpeedConfig

    if not layout.pipelined:
        DeepSpeedConfig(dict(ds_config))
        model = GPT(padded_model(config, layout))
        return [OwnedParameter(name=n, parameter=p) for n, p in model.named_parameters()]
    from megagpt.engine.pipeline import PipelinedGPT, Targets

    parts = tensor_parts(TensorGroup(None, layout.tensor_rank(rank), layout.tensor))
    made = _weightless(PipelinedGPT)(config, layout, parts, Targets())
    DeepSpeedConfig(dict(ds_config), made.mpu())
    assert made.stage_id == layout.stage(rank), (rank, made.stage_id)
    return list(made.named(layout, rank))


def _weightless(kind: type) -> Any:
    """The class with a module that stays on the meta device, from where DeepSpeed would move it."""
    return type(f"Weightless{kind.__name__}", (kind,), {"to": lambda self, *_, **__: self})


@contextlib.contextmanager
def _stand_in(rank: int, world: int) -> Iterator[None]:
    """A process group of `world` ranks of which this process is `rank` and alone."""
    import deepspeed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    before = dict(os.environ)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    try:
        # DeepSpeed says how it cuts the layers.
        with contextlib.redirect_stdout(io.StringIO()):
            dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
            deepspeed.comm.comm.cdb = None
            deepspeed.init_distributed("fake", auto_mpi_discovery=False)
            yield
    finally:
        deepspeed.comm.comm.cdb = None
        if dist.is_initialized():
            dist.destroy_process_group()
        os.environ.clear()
        os.environ.update(before)
