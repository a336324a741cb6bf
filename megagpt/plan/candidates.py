"""A run file on a cluster as jobs of the cost model, one for each layout (L0: numpy, no torch)."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from megagpt.config import RunConfig
from megagpt.config.flops import parameters, visible_keys
from megagpt.config.presets import ModelConfig
from megagpt.plan.accelerators import ACCELERATORS, Accelerator
from megagpt.plan.ds_config import offloads, read_ds_config
from megagpt.plan.jobs import EAGER, SYSTEMS, Jobs, device_columns, jobs_in
from megagpt.plan.layout import Layout, layout_of, layout_problems, micro_batch_of, padded_model
from megagpt.plan.stages import stage_bounds, stage_parameters

MOST_LOGITS = 1 << 29
"""Logits that the loss holds at once; more are computed part by part."""
HOST_COPIES = {1: (0, 3), 2: (0, 3), 3: (2, 6)}
"""ZeRO's stage -> copies of its weights that a rank on a host's processors holds beside DeepSpeed's
buckets: alone, and among others (gloo). No physics: whole numbers read off the resident memory of
small models in fp32 on one and two ranks, those of tests/plan/test_measured.py among them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """The devices that a run is planned for."""

    gpu: str
    """A name of ACCELERATORS."""
    gpus: int
    per_node: int = 8
    domain: int = 8
    """Devices that NVLink connects."""
    node_gb: float = 0.0
    """Network of a node, 10^9 bits/s; 0: as the accelerator's nodes have."""
    price: float = 0.0
    """Dollars for a GPU-hour; 0: the accelerator's."""
    host_gb: float = 0.0
    """Memory of a node's host, 10^9 bytes; 0: as the accelerator's nodes have."""

    @property
    def device(self) -> Accelerator:
        """The data sheet."""
        return ACCELERATORS[self.gpu]

    @property
    def dollars(self) -> float:
        """Of a GPU-hour."""
        return self.price or self.device.dollars

    @property
    def host(self) -> float:
        """Memory of a node's host, 10^9 bytes."""
        return self.host_gb or self.device.host_gb * self.per_node


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to lay a run out."""

    config: RunConfig
    """With [parallel] as this layout has it."""
    layout: Layout
    zero: int
    """ZeRO stage."""
    tree: Mapping[str, Any]
    """zero_optimization of its ds_config."""

    def __str__(self) -> str:
        parallel = self.config.parallel
        again = "" if parallel.recompute == "none" else ", recompute full"
        if again and parallel.recompute_every > 1:
            again += f" every {parallel.recompute_every}"
        return (
            f"pipeline {self.layout.pipeline} x data {self.layout.data} x tensor "
            f"{self.layout.tensor}, {parallel.ds_config}, micro-batch {parallel.micro_batch}{again}"
        )

    @property
    def keys(self) -> list[str]:
        """The overrides that make a run file so."""
        parallel = self.config.parallel
        names = ("ds_config", "pipeline", "tensor", "micro_batch", "recompute")
        return [f"parallel.{name}={getattr(parallel, name)}" for name in names]


def candidate(config: RunConfig, gpus: int) -> Candidate:
    """The layout that the run file asks for. Raises UsageError for an unknown ds_config."""
    tree = read_ds_config(config.parallel.ds_config).get("zero_optimization", {})
    return Candidate(config, layout_of(config, gpus), int(tree["stage"]), tree)


def candidates(config: RunConfig, cluster: Cluster) -> Iterator[Candidate]:
    """Every layout on the cluster that the run allows, whether it fits or not.

    Pipeline x tensor with ZeRO-1, or data ranks alone with ZeRO 1 to 3 and offload; micro-batches
    up to 64 that divide a rank's share; blocks computed again or not. Tensor ranks stay within
    NVLink's reach.
    """
    sequences = config.schedule.segments[-1].batch_tokens // config.model.n_ctx
    names = {name: read_ds_config(name)["zero_optimization"] for name in
             ("pipeline", "zero1", "zero2", "zero3", "zero3_offload")}  # fmt: skip
    for tensor in _divisors(cluster.gpus, min(cluster.domain, config.model.n_head)):
        for pipeline in _divisors(cluster.gpus // tensor, config.model.n_layer):
            plain = pipeline * tensor == 1
            made = dataclasses.replace(config.parallel, pipeline=pipeline, tensor=tensor)
            layout = layout_of(dataclasses.replace(config, parallel=made), cluster.gpus)
            if next(layout_problems(config_with(config, made), layout), None):
                continue
            share = sequences // layout.data
            for micro in [n for n in range(1, 65) if share % n == 0]:
                for again in ("none", "full"):
                    for name in list(names)[1:] if plain else ["pipeline"]:
                        keys = dict[str, Any](micro_batch=micro, recompute=again, ds_config=name)
                        parallel = dataclasses.replace(made, recompute_every=1, **keys)
                        tree = names[name]
                        yield Candidate(config_with(config, parallel), layout, tree["stage"], tree)


def config_with(config: RunConfig, parallel: Any) -> RunConfig:
    """The run with another [parallel]."""
    return dataclasses.replace(config, parallel=parallel)


def _divisors(n: int, most: int) -> list[int]:
    return [k for k in range(1, min(n, most) + 1) if n % k == 0]


def jobs_of(chosen: Sequence[tuple[Candidate, int]], cluster: Cluster) -> Jobs:
    """Jobs of (candidate, tokens of the step) pairs."""
    return jobs_in([_row(one, cluster, tokens) for one, tokens in chosen])


def _row(one: Candidate, cluster: Cluster, tokens: int) -> dict[str, float]:
    config, layout, device = one.config, one.layout, cluster.device
    parallel = config.parallel
    model = padded_model(config, layout)
    micro = micro_batch_of(config, layout, tokens)
    layers = stage_layers(model, layout.pipeline)
    exact = parallel.dtype == "fp32"
    gradient = 2.0 if parallel.dtype == "fp16" and one.zero < 2 else 4.0
    held = max(stage_parameters(model, layout.pipeline, layout.tensor))
    return {
        "layers": model.n_layer,
        "first": layers[0],
        "most": max(layers),
        "last": layers[-1],
        "width": model.d_model,
        "heads": model.n_head,
        "kv_heads": model.n_head,
        "d_ff": model.d_ff,
        "seq": model.n_ctx,
        "keys": sum(visible_keys(model, n, "full") for n in range(model.n_layer)) / model.n_layer,
        "vocab": model.embedding_rows,
        "untied": float(not model.tied),
        "gpus": cluster.gpus,
        "tp": layout.tensor,
        "pp": layout.pipeline,
        "vpp": 1.0,
        "dp": layout.data,
        "zero": one.zero,
        "micro": micro,
        "batch": tokens / model.n_ctx,
        "full": _recomputed(one),
        "flash": 1.0,
        "grad_bytes": gradient,
        "kept_grad_bytes": gradient,
        "weight_bytes": 4.0 if exact else 2.0,
        "logits": min(MOST_LOGITS, micro * model.n_ctx * model.embedding_rows / layout.tensor),
        "buckets": _buckets(one, held, parameters(model), gradient, cluster.gpu == "cpu"),
        "offload": float(bool(offloads(one.tree, "optimizer"))),
        "offload_weights": float(bool(offloads(one.tree, "param"))),
        **device_columns(device, cluster.node_gb),
        **({"peak": device.fp32_tflops * 1e12} if exact else {}),
        "per_node": cluster.per_node,
        "domain": cluster.domain,
        "framework": SYSTEMS.index("megagpt" if compiled(one, cluster) else f"megagpt{EAGER}"),
    }


def compiled(one: Candidate, cluster: Cluster) -> bool:
    """Whether blocks are compiled, as the engine decides it: on GPUs unless the run file says no,
    never under ZeRO-3."""
    wanted = one.config.parallel.compile
    return wanted is not False and (wanted is True or cluster.gpu != "cpu") and one.zero < 3


def _recomputed(one: Candidate) -> float:
    """Share of the blocks that are computed again; a pipeline does so k at a time, with all."""
    parallel = one.config.parallel
    if parallel.recompute == "none":
        return 0.0
    return 1.0 if one.layout.pipelined else 1 / parallel.recompute_every


def stage_layers(model: ModelConfig, stages: int) -> list[int]:
    """Blocks of each pipeline stage."""
    ends = [min(max(bound, 2), 2 + model.n_layer) for bound in stage_bounds(model, stages)]
    return [last - first for first, last in pairwise(ends)]


def _buckets(one: Candidate, held: float, whole: float, gradient: float, lazy: bool) -> float:
    """Bytes of DeepSpeed's buckets: gradients on their way, weights that are gathered.

    ZeRO takes the whole reduce bucket, which the engine cuts to the `whole` model (ds_config.py),
    twice where it overlaps; `lazy`: a host gives memory only for what is written, but has
    HOST_COPIES of the weights.
    """
    tree = one.tree
    bucket = min(tree.get("reduce_bucket_size", 5e8), whole)
    if one.zero == 0:
        return float(min(held, bucket) * gradient if one.layout.data > 1 else 0.0)
    size = min(held, bucket) if lazy else bucket
    # ZeRO-1 stages what it added up in fp32; the others what the backward pass makes.
    width = gradient if one.zero == 1 or one.config.parallel.dtype == "fp32" else 2
    alone, several = HOST_COPIES[one.zero]
    copies = several if one.layout.data > 1 else alone
    live = min(held, tree.get("stage3_max_live_parameters", 1e9)) if one.zero >= 3 else 0.0
    live *= 4 if one.config.parallel.dtype == "fp32" else 2
    buckets = 1 + bool(tree.get("overlap_comm"))
    return float(buckets * size * width + live + (copies * held * width if lazy else 0.0))
