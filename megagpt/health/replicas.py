"""Weights that data-parallel ranks hold in common are equal, bit for bit, or a rank is named (L2).

Under ZeRO 0 to 2 and in a pipeline every data-parallel rank holds the same weights. A digest of
each parameter is computed where it lies and compared across the group. ZeRO-3 has no copies.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megagpt.engine import Engine
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
    digested = hashlib.blake2b(data, digest_size=8).digest()
    return torch.tensor(int.from_bytes(digested, "little", signed=True))


def checksum(weight: Tensor) -> Tensor:
    """A 64-bit digest that a GPU computes without moving the tensor.

    The sum over elements of bits x (odd number that depends on the index), modulo 2^64: a change
    of any one element always changes it, since an odd factor loses nothing.
    """
    flat = weight.detach().contiguous().view(-1)
    bits = flat.view(_BITS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=weight.device)
    for start in range(0, bits.numel(), CHUNK):
        chunk = bits[start : start + CHUNK].to(torch.int64)
        index = torch.arange(start, start + chunk.numel(), device=weight.device)
        # The multiplier of Knuth's 64-bit congruential generator spreads neighbouring indices.
        total += (chunk * (index * 6364136223846793005 * 2 + 1)).sum()
    return total


def outliers(digests: Sequence[object]) -> list[int]:
    """Indices of those that are not the digest that most share; of a tie, the first's counts."""
    common = Counter(digests).most_common(1)[0][0]
    return [i for i, digest in enumerate(digests) if digest != common]


def check_replicas(engine: Engine, step: int) -> None:
    """Raises DamageError, on every rank, when weights differ; all ranks call it together."""
    layout = engine.layout
    # ZeRO-3 has cut what has a ds_id: each rank holds another piece of it.
    shared = [p for p in engine.parameters if not hasattr(p.parameter, "ds_id")]
    if layout.data < 2 or not shared:
        return
    digests = torch.stack([digest(p.parameter) for p in shared]).tolist()
    # One number a rank is all that is sent while everything is well.
    sums = engine.gather(hashlib.blake2b(repr(digests).encode(), digest_size=16).digest())
    groups: dict[tuple[int, int], list[int]] = {}
    for rank in range(layout.world):
        groups.setdefault((layout.stage(rank), layout.tensor_rank(rank)), []).append(rank)
    if not any(outliers([sums[rank] for rank in group]) for group in groups.values()):
        return
    by_name = engine.gather({p.name: d for p, d in zip(shared, digests, strict=True)})
    lines = [line for group in groups.values() for line in _differences(group, by_name)]
    raise DamageError(
        f"after step {step} weights that data-parallel ranks hold in common differ:\n"
        + "\n".join(f"  - {line}" for line in lines)
        + "\nthe hardware of these ranks is suspect (memory, device or network); nothing was "
        "saved: run again without it to go on from the checkpoint before"
    )


def _differences(group: Sequence[int], by_name: Sequence[Mapping[str, int]]) -> list[str]:
    """One line for each rank of a group that differs from the others, with the parameters.

    `by_name`: the digest of each parameter, of every rank."""
    wrong: dict[int, list[str]] = {}
    for name in by_name[group[0]]:
        for index in outliers([by_name[rank][name] for rank in group]):
            wrong.setdefault(group[index], []).append(name)
    lines = []
    for rank, names in sorted(wrong.items()):
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        other = next(r for r in group if r != rank)
        doubt = " (of two ranks either may be wrong)" if len(group) == 2 else ""
        lines.append(f"rank {rank} differs from rank {other} in {names[0]}{more}{doubt}")
    return lines
