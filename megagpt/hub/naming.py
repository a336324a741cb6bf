"""Each parameter under its name and in its form on either side (L3).

Letters: D d_model, V tokens. Nothing is read before it is asked for, so that one tensor is in
memory at a time.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megagpt.checkpoint.slice_file import fit_rows
from megagpt.checkpoint.weights import PlannedTensor
from megagpt.config.presets import ModelConfig
from megagpt.errors import UsageError
from megagpt.hub.shapes import NANOGPT, model_type, query_scale
from megagpt.model import GPT

Read = Callable[[str], Tensor]
"""Name -> whole tensor."""
BUFFERS = (".attn.bias", ".attn.masked_bias", ".attn.attention.bias", ".attn.attention.masked_bias")
"""Masks that older versions saved among the weights."""


def shapes_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every parameter, without padding."""
    with torch.device("meta"):
        model = GPT(dataclasses.replace(config, vocab_multiple=1))
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def their_names(kind: str, name: str) -> list[str]:
    """transformers' names of what makes up our parameter: GPT-Neo has q, k and v apart, and no
    biases of theirs."""
    if name == "head.weight":
        return ["lm_head.weight"]
    layer, _, rest = name.partition(".")
    if kind == "openai-gpt":
        layer = {"wte": "tokens_embed", "wpe": "positions_embed"}.get(layer, layer)
    theirs = f"transformer.{layer}.{rest}"
    if kind != "gpt_neo":
        return [theirs]
    stem, _, leaf = theirs.partition(".attn.c_attn.")
    if leaf == "weight":
        return [f"{stem}.attn.attention.{letter}_proj.weight" for letter in "qkv"]
    return [] if leaf else [theirs.replace(".attn.c_proj.", ".attn.attention.out_proj.")]


def is_turned(kind: str, name: str) -> bool:
    """Whether our parameter is stored transposed: Conv1D is (in, out)."""
    return is_matrix(name) and kind not in (NANOGPT, "gpt_neo")


def is_matrix(name: str) -> bool:
    """Whether the parameter is the matrix of one of the linear layers."""
    return name.endswith(".weight") and (".attn.c_" in name or ".mlp.c_" in name)


# --- going out ----------------------------------------------------------------------------------


def exported(config: ModelConfig, read: Read, dtype: torch.dtype) -> Iterator[PlannedTensor]:
    """What transformers' class of the model holds. `read` gives our parameters by canonical name;
    dtype is what the tensors will be rounded to."""
    shapes = shapes_of(config)

    def whole(name: str) -> Tensor:
        return fit_rows(read(name), shapes[name], name)

    def as_theirs(name: str, turned: bool) -> Callable[[], Tensor]:
        return lambda: whole(name).t() if turned else whole(name)

    kind = model_type(config)
    for name, shape in shapes.items():
        theirs, turned = their_names(kind, name), is_turned(kind, name)
        if len(theirs) == 3:
            block = name.removesuffix(".attn.c_attn.weight")
            for part, one in enumerate(theirs):
                make = partial(_projection, config, whole, block, part, dtype)
                yield PlannedTensor(one, (shape[0] // 3, shape[1]), make)
        elif theirs and kind == "gpt_neo" and name.endswith(".ln_1.bias"):
            block = name.removesuffix(".ln_1.bias")
            yield PlannedTensor(theirs[0], shape, partial(_bias, whole, block, dtype))
        elif theirs:
            yield PlannedTensor(
                theirs[0], shape[::-1] if turned else shape, as_theirs(name, turned)
            )
        if kind == "imagegpt" and is_matrix(name):
            bias = theirs[0].removesuffix("weight") + "bias"
            yield PlannedTensor(bias, shape[:1], partial(torch.zeros, shape[0]))


def _bias(read: Read, block: str, dtype: torch.dtype) -> Tensor:
    """ln_1.bias (D,) of a block, moved where q, k or v have a bias to be folded."""
    beta = read(f"{block}.ln_1.bias")
    if not read(f"{block}.attn.c_attn.bias").any():
        return beta
    return moved_bias(read(f"{block}.ln_1.weight"), beta, dtype)[1]


def _projection(
    config: ModelConfig, read: Read, block: str, part: int, dtype: torch.dtype
) -> Tensor:
    """q (part 0), k or v of a block: (D, D) in fp64, without a bias."""
    weight = read(f"{block}.attn.c_attn.weight").chunk(3)[part].double()
    all_biases = read(f"{block}.attn.c_attn.bias")
    if all_biases.any():
        gamma, beta = read(f"{block}.ln_1.weight"), read(f"{block}.ln_1.bias")
        weight = folded(weight, all_biases.chunk(3)[part], gamma, beta, dtype)
    # Rounded first: only numbers of fp32 come back from a division as they were on import.
    return weight.float().double() / math.sqrt(config.d_head) if part == 0 else weight


def moved_bias(gamma: Tensor, beta: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(w (D,), beta' (D,)): LayerNorm's null direction, and the bias moved along it, in fp64.

    A LayerNorm's output is z = gamma * x + beta, where the elements of x sum to 0. So for
    w = 1 / gamma, w.z = w.beta whatever x is; where a gain is 0 its element alone is constant.
    The bias moves so that this constant is sqrt(D), the size of a normalised vector, and is
    rounded to dtype here, so that what is folded knows its last digit.
    """
    gain, bias = gamma.to(dtype).double(), beta.double()
    zero = gain == 0
    w = zero.double() if zero.any() else 1 / gain
    w = w / w.norm()
    moved = bias + (math.sqrt(len(w)) - w @ bias) * w
    return w, moved.to(dtype).double()


def folded(weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, dtype: torch.dtype) -> Tensor:
    """W' (D, D) in fp64 with W' z' = W z + b behind a LayerNorm whose bias is moved: z' = z +
    moved - beta, and w.z' is the constant w.moved, so that a row of w adds what is missing."""
    w, moved = moved_bias(gamma, beta, dtype)
    missing = bias.double() - weight @ (moved - beta.double())
    return weight + torch.outer(missing, w) / (w @ moved)


# --- coming in ----------------------------------------------------------------------------------


def imported(
    theirs: Mapping[str, Any], config: ModelConfig, names: frozenset[str], read: Read
) -> Iterator[PlannedTensor]:
    """Our parameters from tensors of transformers' (or nanoGPT's) names.

    names: those that are there; read: name -> tensor in fp32. Raises UsageError that names a
    tensor which is missing, none of the model's, or of another shape.
    """
    kind = theirs["model_type"]
    known = canonical(names)
    shapes = shapes_of(config)
    plan = {name: their_names(kind, name) for name in shapes}
    needed = {name for of in plan.values() for name in of}
    optional = {"lm_head.weight"} if config.tied else set()
    if kind == "imagegpt":
        optional = {n.removesuffix("weight") + "bias" for n in needed if ".c_" in n}
    if theirs.get("bias") is False:  # nanoGPT without biases: they are 0
        optional |= {name for name in needed if name.endswith(".bias")}
    _refuse_names(set(known), needed, optional)

    def get(name: str) -> Tensor:
        return read(known[name])

    if kind == "imagegpt":
        _refuse_biases(get, sorted(optional & set(known)))
    elif "lm_head.weight" in known:
        _refuse_untied(get, plan["wte.weight"][0])
    for name, shape in shapes.items():
        scale = 1.0
        if ".attn.c_attn." in name:
            scale = query_scale(theirs, config, int(name.split(".")[1]))
        sources = [one for one in plan[name] if one in known]
        make = partial(_formed, shape, sources, get, is_turned(kind, name), scale)
        yield PlannedTensor(name, shape, make)


def canonical(names: frozenset[str]) -> dict[str, str]:
    """Name with transformers' prefix -> name as it is stored, without buffers."""
    found = {}
    for name in names:
        if name.endswith(BUFFERS) and ".c_" not in name:
            continue
        bare = name.removeprefix("_orig_mod.").removeprefix("transformer.")
        found[bare if bare.startswith("lm_head.") else f"transformer.{bare}"] = name
    # Tools that save a tied matrix once may have kept the head's name.
    if "transformer.wte.weight" not in found and "transformer.tokens_embed.weight" not in found:
        if "lm_head.weight" in found:
            found["transformer.wte.weight"] = found["lm_head.weight"]
    return found


def _refuse_names(there: set[str], needed: set[str], optional: set[str]) -> None:
    missing, unknown = sorted(needed - there - optional), sorted(there - needed - optional)
    if missing or unknown:
        what = [f"{name} is missing" for name in missing[:3]]
        what += [f"{name} is none of the model's" for name in unknown[:3]]
        count = len(missing) + len(unknown)
        raise UsageError(
            f"{count} tensors are not those of the model that its config describes: "
            + "; ".join(what)
            + ("; ..." if len(what) < count else "")
        )


def _refuse_biases(get: Read, names: list[str]) -> None:
    for name in names:
        if get(name).any():
            raise UsageError(f"{name}: must be 0 everywhere; our Image GPT has no biases")


def _refuse_untied(get: Read, embedding: str) -> None:
    if not torch.equal(get("lm_head.weight"), get(embedding)):
        raise UsageError(
            "lm_head.weight: is not the embedding; our model ties the two, so its logits would be "
            "others"
        )


def _formed(
    shape: tuple[int, ...], sources: list[str], get: Read, turned: bool, scale: float
) -> Tensor:
    """Our parameter in fp32, zeros where it has no sources. turned: it is stored transposed; scale:
    the factor of q's rows."""
    if not sources:
        return torch.zeros(shape)
    whole = torch.cat([get(one) for one in sources]) if len(sources) > 1 else get(sources[0])
    whole = whole.t() if turned else whole
    if tuple(whole.shape) != shape:
        raise UsageError(
            f"{sources[0]}: has shape {tuple(whole.shape)}, but {shape} in the model that its "
            "config describes"
        )
    if scale != 1.0:
        q, rest = whole.double().split([shape[0] // 3, shape[0] - shape[0] // 3])
        whole = torch.cat([q * scale, rest])
    return whole.float().contiguous()
