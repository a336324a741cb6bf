"""Where DeepSpeed keeps fp32 weights and Adam's moments, one view for every ZeRO stage (L2).

ZeRO lays all parameters of a group end to end and gives each data-parallel rank one stretch of
it. A `Slice` is the part of one parameter that lies in this rank's stretch: readable and writable
under the parameter's canonical name, whatever the stage. Checkpoints are made of slices, so any
layout can read what any other wrote.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megagpt.engine import split

STATES = ("fp32", "exp_avg", "exp_avg_sq")
"""What is stored of every parameter: the fp32 weight and Adam's first and second moment."""
FLAT_MASTERS = (
    "fp32_partitioned_groups_flat",  # stage 3
    "single_partition_of_fp32_groups",  # stages 1 and 2
    "fp32_groups_flat_partition",  # stage 1 with fp32 gradient accumulation
)
"""Where DeepSpeed's optimizers keep the flat fp32 partitions that they step on; stage 0 has none
and steps on the parameters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorShare:
    """Which part of a parameter a tensor-parallel rank holds."""

    kind: str = "whole"
    """whole, column (rows of the matrix), qkv (rows of each of q, k, v) or row (columns)."""
    part: int = 0
    parts: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """Elements [start, start + numel) of one parameter, flattened, on this rank."""

    name: str
    """Canonical name, as in a consolidated checkpoint."""
    shape: tuple[int, ...]
    """Shape of the parameter on a tensor-parallel rank, which is all of it without tensor split."""
    split: TensorShare
    start: int
    numel: int
    owned: bool
    """False: another rank holds the same elements and saves them."""
    read: Callable[[str], Tensor]
    """key -> (numel,) fp32, a view or a copy."""
    write: Callable[[str, Tensor], None]
    """(key, (numel,) fp32): sets the elements."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerState:
    """What the optimizer knows beside the slices."""

    updates: int
    """Updates applied: Adam's step, for the correction of its bias."""
    loss_scale: dict[str, float]
    """DeepSpeed's dynamic loss scaler under fp16; empty otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnedParameter:
    """A parameter under its canonical name, with its part of the tensor split."""

    name: str
    parameter: Any
    split: TensorShare = TensorShare()
    owned: bool = True
    """False for copies: a tied weight beyond its first stage, a replica on tensor rank > 0."""


def optimizer_slices(
    zero: Any, parameters: Iterable[OwnedParameter], data_rank: int
) -> Iterator[Slice]:
    """The slices of `parameters` that DeepSpeed's optimizer `zero` keeps on this rank."""
    for one in parameters:
        if hasattr(one.parameter, "ds_id"):
            yield from _slice_of_stage_3(zero, one)
        elif hasattr(one.parameter, "_hp_mapping"):
            yield from _slice_of_stage_1_and_2(one)
        else:
            yield _slice_of_stage_0(zero, one, data_rank)


def _slice(one: OwnedParameter, shape: Any, start: int, numel: int, **how: Any) -> Slice:
    how = {"owned": one.owned, **how}
    return Slice(
        name=one.name, shape=tuple(shape), split=one.split, start=start, numel=numel, **how
    )


def _slice_of_stage_0(zero: Any, one: OwnedParameter, data_rank: int) -> Slice:
    """Every rank holds everything; the first saves it."""
    parameter = one.parameter

    def view(key: str) -> Tensor:
        tensor = parameter.data if key == "fp32" else zero.state[parameter][key]
        return tensor.view(-1)

    def write(key: str, value: Tensor) -> None:
        view(key).copy_(value)

    owned = one.owned and data_rank == 0
    size = parameter.numel()
    return _slice(one, parameter.shape, 0, size, owned=owned, read=view, write=write)


def _slice_of_stage_1_and_2(one: OwnedParameter) -> Iterator[Slice]:
    """DeepSpeed maps each parameter to its fragment of the rank's flat fp32 partition."""
    mapping = one.parameter._hp_mapping
    if mapping is None:
        return

    def view(key: str) -> Tensor:
        return mapping.get_hp_fragment(None if key == "fp32" else key)

    def write(key: str, value: Tensor) -> None:
        view(key).data.copy_(value)

    address = mapping.lp_fragment_address
    shape = one.parameter.shape
    yield _slice(one, shape, address.start, address.numel, read=view, write=write)


def _slice_of_stage_3(zero: Any, one: OwnedParameter) -> Iterator[Slice]:
    """Each parameter is cut into equal parts over the ranks; the last one ends in padding."""
    import deepspeed.comm as ds_dist

    parameter = one.parameter
    part = parameter.ds_tensor.numel()
    start = part * ds_dist.get_rank(group=parameter.ds_process_group)
    numel = min(part, parameter.ds_numel - start)
    if numel <= 0:
        return

    def read(key: str) -> Tensor:
        return zero.get_local_fp32_param(parameter, None if key == "fp32" else key)[:numel]

    def write(key: str, value: Tensor) -> None:
        padded = torch.zeros(part, dtype=value.dtype)
        padded[:numel] = value
        zero.set_local_hp_param(padded, parameter, None if key == "fp32" else key)

    yield _slice(one, parameter.ds_shape, start, numel, read=read, write=write)


def create_moments(zero: Any) -> None:
    """Gives the optimizer the moments that torch would create in its first step.

    Call it once, before any step: in its first step DeepSpeed's ZeRO-1 and 2 link the moments of
    all groups when only the first group has any, so the others would never be found.
    """
    adam = getattr(zero, "optimizer", zero)
    flat = [name for name in FLAT_MASTERS if hasattr(zero, name)]
    of_groups = (group["params"] for group in adam.param_groups)
    for parameter in getattr(zero, flat[0]) if flat else chain.from_iterable(of_groups):
        state = adam.state[parameter]
        for key in STATES[1:]:
            if key not in state:
                state[key] = torch.zeros_like(parameter.data)
        if "step" not in state:
            device = parameter.device if adam.defaults.get("fused") else torch.device("cpu")
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._lazy_init_hp_params_optimizer_state()


def read_state(zero: Any) -> OptimizerState:
    """Updates applied, and the loss scale where there is one."""
    adam = getattr(zero, "optimizer", zero)
    steps = [int(state["step"]) for state in adam.state.values() if "step" in state]
    return OptimizerState(updates=max(steps, default=0), loss_scale=_loss_scale(zero))


_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def _loss_scale(zero: Any) -> dict[str, float]:
    scaler = getattr(zero, "loss_scaler", None)
    if not getattr(zero, "dynamic_loss_scale", False) or scaler is None:
        return {}
    return {name: getattr(scaler, name) for name in _SCALER}


def write_state(zero: Any, state: OptimizerState) -> None:
    """Sets Adam's step and the loss scale, then makes the model's weights those of the masters.

    Each `step` gets a tensor of its own: torch's AdamW counts up in place, and one tensor shared
    by ZeRO-3's sub-groups would be counted up once for each of them.
    """
    adam = getattr(zero, "optimizer", zero)
    for one in adam.state.values():
        if "step" in one:
            one["step"] = torch.full_like(one["step"], float(state.updates))
    # A run that has come to bf16 or fp32 scales no loss; one that comes to fp16 begins anew.
    if _loss_scale(zero):
        for name, value in state.loss_scale.items():
            setattr(zero.loss_scaler, name, value)
    if hasattr(zero, "fp16_partitioned_groups_flat"):
        _refresh_stage_3(zero)
    elif hasattr(zero, "update_lp_params"):
        zero.update_lp_params()


def _refresh_stage_3(zero: Any) -> None:
    """Copies the masters into the partitioned weights and gathers the ones that stay whole."""
    zero.checkpoint_event_prologue()
    for index, master in enumerate(zero.fp32_partitioned_groups_flat):
        flat = zero.fp16_partitioned_groups_flat[index]
        if flat is None or master.numel() == 0:
            continue
        flat.data.copy_(master.data)
        for part, updated in zip(
            zero.fp16_partitioned_groups[index],
            zero.unflatten(flat, zero.fp16_partitioned_groups[index]),
            strict=True,
        ):
            part.data = updated.data
    zero.checkpoint_event_epilogue()


# --- whole parameters ---------------------------------------------------------------------------

_Piece = tuple[TensorShare, tuple[int, ...], int, Tensor]
"""(share, shape of the tensor-parallel rank's part, first element in it, elements)."""


def gather_whole(slices: Iterable[Slice]) -> Iterator[tuple[str, Tensor | None]]:
    """(canonical name, the whole fp32 weight on the host) of each parameter in turn; None on
    every rank but 0. All ranks must take all of them, for each is gathered when it is asked for."""
    owned: dict[str, list[Slice]] = {}
    for one in slices:
        if one.owned:
            owned.setdefault(one.name, []).append(one)
    names: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(names, list(owned))
    for name in dict.fromkeys(name for of_rank in names for name in of_rank):
        pieces = [(s.split, s.shape, s.start, _to_host(s)) for s in owned.get(name, [])]
        gathered: list[list[_Piece]] | None = None
        if dist.get_rank() == 0:
            gathered = [[] for _ in names]
        dist.gather_object(pieces, gathered)
        yield name, _assembled([p for of_rank in gathered for p in of_rank]) if gathered else None


def _to_host(one: Slice) -> Tensor:
    return one.read("fp32").detach().to("cpu", torch.float32, copy=True)


def _assembled(pieces: list[_Piece]) -> Tensor:
    """The whole parameter; every element of it is in some piece."""
    share, shape, _, _ = pieces[0]
    shards = torch.full((share.parts, torch.Size(shape).numel()), torch.nan)
    for of, _, start, values in pieces:
        shards[of.part, start : start + values.numel()] = values
    return split.join([shard.view(shape) for shard in shards], share.kind)
