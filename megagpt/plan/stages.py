"""Pipeline stages of nearly equal work: pure functions of the model (L0, stdlib only).

The slowest stage sets the pace of a pipeline. Work is counted in FLOPs of a forward pass, the
logits included: for a small model they are worth several blocks, and a split by blocks alone
would leave the last stage far behind the others.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

from megagpt.config.flops import head_flops, layer_flops, parameters
from megagpt.config.presets import ModelConfig


def layer_costs(config: ModelConfig) -> list[float]:
    """FLOPs of one token's forward pass through each layer: wte, wpe, blocks, ln_f, head."""
    blocks = [layer_flops(config, index) for index in range(config.n_layer)]
    return [0.0, 0.0, *blocks, 0.0, head_flops(config)]


@lru_cache
def stage_bounds(config: ModelConfig, stages: int) -> list[int]:
    """First layer of each stage, and the number of layers as the last entry: `stages` + 1 numbers.

    Every stage has a block at least; among such splits the one whose costliest stage is cheapest,
    with ties resolved for blocks as late as possible: the first stage bears the embedding and
    keeps the activations of as many micro-batches as there are stages, the last of one.
    """
    costs = layer_costs(config)
    # Blocks are dealt out from the last; wte and wpe stay with the first stage, ln_f and head with
    # the last.
    own = costs[2:-2]
    head = sum(costs[-2:])
    low, high = 0.0, sum(costs)
    best = _deal(own, head, stages, high)
    assert best is not None, (config.n_layer, stages)
    for _ in range(60):
        middle = (low + high) / 2
        found = _deal(own, head, stages, middle)
        if found is None:
            low = middle
        else:
            best, high = found, middle
    return [0, *(2 + block for block in best[1:]), len(costs)]


def _deal(own: Sequence[float], head: float, stages: int, limit: float) -> list[int] | None:
    """First block of each stage when no stage may cost more than `limit`; None if impossible."""
    most = limit * (1 + 1e-12)
    firsts = [len(own)]
    for stage in reversed(range(stages)):
        cost, block = head if stage == stages - 1 else 0.0, firsts[-1]
        # The stages still to come need a block each.
        while block > stage and (cost + own[block - 1] <= most or block == firsts[-1]):
            block -= 1
            cost += own[block]
        if cost > most:
            return None
        firsts.append(block)
    return firsts[:0:-1] if firsts[-1] == 0 else None


@lru_cache
def stage_parameters(config: ModelConfig, stages: int, tensor: int = 1) -> list[int]:
    """Parameters that a rank of each stage holds, the tied embedding's copy on the last included.

    With a tensor split every matrix is shared out; norms, positions and the biases of the
    row-parallel layers stay whole on every rank.
    """
    if stages == tensor == 1:
        return [parameters(config)]
    d, bounds = config.d_model, stage_bounds(config, stages)
    embedding = config.embedding_rows // tensor * d
    matrices = (4 * d * d + 2 * d * config.d_ff) // tensor
    block = matrices + (3 * d + config.d_ff) // tensor + 2 * d + 4 * d
    layers = [embedding, config.n_ctx * d, *([block] * config.n_layer), 2 * d]
    counts = [sum(layers[first:last]) for first, last in pairwise(bounds)]
    if stages > 1:
        counts[-1] += embedding
    return counts
