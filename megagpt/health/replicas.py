"""Weights that data-parallel ranks hold in common are equal, bit for bit, or a rank is named (L2).

Under ZeRO 0 to 2 and in a pipeline every data-parallel rank holds the same weights. A digest of
each parameter is computed where it lies and compared across the group. ZeRO-3 has no copies.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from megagpt.engine.engine import Engine
from megagpt.errors import DamageError

CHUNK = 1 << 22
"""Elements hashed at a time: their int64 copies take 64 MB."""
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest(weight: Tensor) -> Tensor:
    """A 64-bit digest of a tensor's bits, int64 on its device."""
    if weight.device.type != "cpu":
        return checksum(weight)
    # Ten times as fast as the sum where the processor is the device.
    data = weight.detach().contiguous().view(-1).view(torch.uint8).numpy().data
    found = hashlib.blake2b(data, digest_size=8).digest()
    return torch.tensor(int.from_bytes(found, "little", signed=True))


def checksum(weight: Tensor) -> Tensor:
    """A 64-bit digest that a GPU computes without moving the tensor.

    The sum over elements of bits x (odd number that depends on the place), modulo 2^64: a change
    of any one element always changes it, since an odd factor loses nothing.
    """
    flat = weight.detach().contiguous().view(-1)
    bits = flat.view(_BITS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=weight.device)
    for start in range(0, bits.numel(), CHUNK):
        part = bits[start : start + CHUNK].to(torch.int64)
        place = torch.arange(start, start + part.numel(), device=weight.device)
        # The multiplier of Knuth's 64-bit congruential generator spreads neighbouring places.
        total += (part * (place * 6364136223846793005 * 2 + 1)).sum()
    return total


def odd_ones(digests: Sequence[object]) -> list[int]:
    """Places whose digest is not the one that most share; of equal numbers, the first's counts."""
    if len(set(digests)) < 2:
        return []
    common = Counter(digests).most_common(1)[0][0]
    return [i for i, found in enumerate(digests) if found != common]


def check_replicas(engine: Engine, step: int) -> None:
    """Raises DamageError, on every rank, when weights differ; all ranks call it together."""
    layout, rank = engine.layout, engine.ranks.rank
    shared = [one for one in engine.parameters if not hasattr(one.parameter, "ds_id")]
    if layout.data < 2 or not shared:
        return
    own = torch.stack([digest(one.parameter) for one in shared]).tolist()
    # One number a rank is all that is sent while everything is well.
    sums = engine.gather(hashlib.blake2b(repr(own).encode(), digest_size=16).digest())
    groups: dict[tuple[int, int], list[int]] = {}
    for other in range(layout.world):
        groups.setdefault((layout.stage(other), layout.tensor_rank(other)), []).append(other)
    members = groups[layout.stage(rank), layout.tensor_rank(rank)]
    well = not any(odd_ones([sums[r] for r in group]) for group in groups.values())
    if well:
        return
    names = [one.name for one in shared]
    details = engine.gather(dict(zip(names, own, strict=True)))
    found = _differences(names, members, details)
    problems = dict.fromkeys(p for part in engine.gather(found) for p in part)
    raise DamageError(
        f"after step {step} weights that data-parallel ranks hold in common differ:\n"
        + "\n".join(f"  - {problem}" for problem in problems)
        + "\nthe hardware of these ranks is suspect (memory, device or network); nothing was "
        "saved: run again without it to go on from the checkpoint before"
    )


def _differences(
    names: Sequence[str], members: Sequence[int], details: Sequence[dict[str, int]]
) -> list[str]:
    """One line for each rank of a group that differs from the others, with the parameters."""
    wrong: dict[int, list[str]] = {}
    for name in names:
        for place in odd_ones([details[r][name] for r in members]):
            wrong.setdefault(members[place], []).append(name)
    lines = []
    for rank, parameters in sorted(wrong.items()):
        more = f" and {len(parameters) - 1} more" if len(parameters) > 1 else ""
        others = [r for r in members if r != rank]
        doubt = " (of two ranks either may be wrong)" if len(members) == 2 else ""
        lines.append(f"rank {rank} differs from rank {others[0]} in {parameters[0]}{more}{doubt}")
    return lines
