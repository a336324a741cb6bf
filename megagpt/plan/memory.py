"""What a run takes of the disk and of a device, in bytes (L0, stdlib only)."""

from megagpt.config import RunConfig
from megagpt.config.flops import parameters
from megagpt.config.presets import ModelConfig
from megagpt.plan.layout import Layout, padded_model
from megagpt.plan.stages import stage_bounds, stage_parameters

BYTES_PER_PARAMETER = 12
"""Of a checkpoint: the fp32 weight and Adam's two fp32 moments."""


def checkpoint_bytes(model: ModelConfig) -> int:
    """One checkpoint, whatever the layout; the headers of its files and the padding of the
    vocabulary are not counted."""
    return BYTES_PER_PARAMETER * parameters(model)


def checkpoints_kept(config: RunConfig) -> int:
    """Checkpoints that lie on the disk at once, at most: the newest, milestones, one half-written.

    Milestones are the checkpoints of checkpoint.keep_every_tokens.
    """
    every = config.checkpoint.keep_every_tokens
    milestones = config.schedule.end_tokens // every if every else 0
    return config.checkpoint.keep_last + milestones + 1


def state_bytes(config: RunConfig, layout: Layout, stage: int) -> float:
    """Weights, gradients and optimizer on the device of the fullest rank, without offload.

    A parameter takes its weight, the gradient that is added up (fp32, except under ZeRO-1 in
    fp16), and 12 bytes of fp32 master and moments; ZeRO shares out the last over the data ranks
    from stage 1 on, gradients from 2, weights from 3.
    """
    dtype, data = config.parallel.dtype, layout.data
    weight = 4 if dtype == "fp32" else 2
    gradient = 2 if dtype == "fp16" and stage == 1 else 4
    optimizer = BYTES_PER_PARAMETER if stage else 8
    shares = [data if stage >= least else 1 for least in (3, 2, 1)]
    each = weight / shares[0] + gradient / shares[1] + optimizer / shares[2]
    return each * max(
        stage_parameters(padded_model(config, layout), layout.pipeline, layout.tensor)
    )


def activation_bytes(config: RunConfig, layout: Layout, micro_batch: int) -> float:
    """What the first pipeline stage keeps for the backward pass, at 16 bits.

    Korthikanti et al. 2022 (equation 2 with a fused attention, which keeps no scores): a block
    keeps s b d (10 + 24 / tensor) bytes of each micro-batch in flight, or its input of 2 s b d
    where it is recomputed, and then one block in full. The last stage, or the only one, holds 2^29
    logits of 2 bytes at most beside them.
    """
    model, parallel = config.model, config.parallel
    first, second, *_ = stage_bounds(model, layout.pipeline)
    blocks = len(set(range(first, second)) & set(range(2, 2 + model.n_layer)))
    sbd = model.n_ctx * micro_batch * model.d_model
    whole = sbd * (10 + 24 / layout.tensor)
    kept = blocks * whole
    if parallel.recompute == "full":
        again = -(-blocks // parallel.recompute_every)
        kept = again * 2 * sbd + (blocks - again) * whole
    kept = kept * layout.pipeline + (whole if parallel.recompute == "full" else 0.0)
    logits = 2 * min(1 << 29, model.n_ctx * micro_batch * model.vocab_size // layout.tensor)
    width = 2 if parallel.dtype == "fp32" else 1
    return width * (kept + (logits if layout.pipeline == 1 else 0))
