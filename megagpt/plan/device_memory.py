"""Memory of a device, item by item and stage by stage (L0: numpy, no torch).

Letters as in cost.py. Sources: Korthikanti et al. 2022, table 2 (activations, here with any width
of the MLP), Rajbhandari et al. 2020 (states under ZeRO), DeepSpeed's schedule.py (buffers of the
pipeline) and its bf16 optimizer (fp32 gradients beside the weights).
"""

from dataclasses import dataclass

import numpy as np

from megagpt.plan.cost import Constants, by_system, layer_parameters, ours
from megagpt.plan.jobs import SYSTEMS, Column, Jobs

CORE, FSDP = SYSTEMS.index("megatron-core"), SYSTEMS.index("fsdp")
MEMORY_ITEMS = (
    "weights", "gradients", "optimizer", "activations", "logits", "buffers", "overhead"
)  # fmt: skip
"""What a device's memory holds, in the order in which it is told."""


@dataclass(frozen=True, slots=True)
class Stage:
    """What one pipeline stage of each job bears."""

    layers: Column
    in_flight: Column
    """Micro-batches whose activations it keeps at once."""
    embeds: Column
    """1 where it holds the embedding, or its copy for the logits."""
    predicts: Column
    """1 where it computes the logits."""
    parameters: Column | None = None
    """Of a rank, where they are known to the last bias; None: what layers and embedding have."""


def fullest(jobs: Jobs, c: Constants) -> dict[str, Column]:
    """Bytes by item on the fullest of the first, the second and the last stage."""
    p, m = jobs.pp, jobs.micro_batches
    depth = np.minimum(p, m)
    # Interleaved stages keep a part more (Korthikanti, section 4.2.3).
    depth = depth * np.where(jobs.vpp > 1, 1 + (p - 1) / (p * jobs.vpp), 1.0)
    one, alone = np.ones_like(p), (p == 1).astype(float)
    stages = [
        Stage(jobs.first, depth, one, alone),
        Stage(np.where(p > 2, jobs.most, jobs.first), np.maximum(1, depth - 1), 0 * one, 0 * one),
        Stage(jobs.last, one, one, one),
    ]
    found = [stage_bytes(jobs, c, stage) for stage in stages]
    totals = np.array([sum(items.values()) for items in found])
    worst = np.argmax(totals, axis=0)
    return {name: np.choose(worst, [items[name] for items in found]) for name in MEMORY_ITEMS}


def stage_bytes(jobs: Jobs, c: Constants, stage: Stage) -> dict[str, Column]:
    """Bytes by item (MEMORY_ITEMS) on a rank of one stage."""
    embedding = jobs.vocab * jobs.width / jobs.tp
    copies = np.where(jobs.pp > 1, 1.0, 1.0 + jobs.untied)
    held = layer_parameters(jobs) * stage.layers + stage.embeds * embedding * copies
    held = held if stage.parameters is None else stage.parameters
    share = [np.where(jobs.zero >= least, jobs.dp, 1.0) for least in (3, 2, 1)]
    rows = jobs.micro * jobs.seq
    size = jobs.weight_bytes
    edge = size * rows * jobs.width
    whole = layer_activations(jobs)
    again = jobs.full
    kept = stage.layers * stage.in_flight * (again * edge + (1 - again) * whole)
    # A layer that is computed again is there in full for a while, or its scores.
    kept = kept + again * whole + jobs.selective * (1 - jobs.flash) * scores_of(jobs)
    # Two layers' weights at once; DeepSpeed's own bound on them is among its buckets.
    gathered = np.where((jobs.zero >= 3) & (jobs.buckets == 0), 2 * size, 0.0)
    gathered = gathered * layer_parameters(jobs)
    passed = np.where(jobs.pp > 1, 2 * edge * stage.in_flight, 0.0)
    # DeepSpeed copies a rank's own part of the gradients for the update: ZeRO-1 out of the whole
    # ones, ZeRO-3 into one flat piece (stage3.py, _prepare_fp32_grad_for_sub_group).
    flat = ours(jobs) & ((jobs.zero == 1) | (jobs.zero == 3)) & (jobs.offload == 0)
    copied = np.where(flat, jobs.kept_grad_bytes * held / jobs.dp, 0.0)
    # fp32 weights are their own master only without ZeRO.
    moments = np.where((size > 2) & ((jobs.zero == 0) | ~ours(jobs)), 8, 12)
    return {
        "weights": (1 - jobs.offload_weights) * size * held / share[0],
        # Gradients of a part go to the host with the optimizer, as they are made.
        "gradients": jobs.kept_grad_bytes * held / share[1] * (1 - jobs.offload * (jobs.zero >= 2))
        + copied,
        "optimizer": (1 - jobs.offload) * moments * held / share[2],
        "activations": c["activations"] * kept,
        "logits": stage.predicts * by_system(c, "logits", jobs) * size / 2 * jobs.logits,
        "buffers": gathered + passed + jobs.buckets,
        "overhead": by_system(c, "overhead", jobs) * 1e9 * np.ones_like(held),
    }


def layer_activations(jobs: Jobs) -> Column:
    """Bytes that a layer keeps of one micro-batch for its backward pass, at 16 bits.

    s b h (10 + 24 / t + 5 a s / (h t)), the last without fused attention or where the scores are
    computed again; a gated MLP keeps two products and their mix, and what one activates to unless
    it is fused (Megatron-Core). Products in fp8 keep their inputs so (Transformer Engine).
    """
    h, t = jobs.width, jobs.tp
    apart = np.where(jobs.sequence_parallel > 0, t, 1.0)
    gate = np.where(jobs.framework == CORE, 6, 8)
    wide = np.where(jobs.gated > 0, gate, 4) - jobs.fp8
    inside = 4 + 4 * jobs.kv_heads / jobs.heads + jobs.d_ff / h * wide
    # PyTorch's selective checkpoints of single operations keep every other product.
    half = np.where((jobs.selective > 0) & (jobs.framework == FSDP), 0.5, 1.0)
    kept = h * ((10 - 2 * jobs.fp8) / apart + inside / t)
    stored = np.where((jobs.flash == 0) & (jobs.selective == 0), scores_of(jobs), 0.0)
    return jobs.weight_bytes / 2 * half * jobs.seq * jobs.micro * kept + stored


def scores_of(jobs: Jobs) -> Column:
    """Bytes of a layer's attention scores of one micro-batch, of their softmax and dropout."""
    return jobs.weight_bytes / 2 * jobs.micro * 5 * jobs.heads / jobs.tp * jobs.seq**2
