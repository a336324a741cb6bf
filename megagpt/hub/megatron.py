"""Checkpoints of Megatron-LM's GPT on one rank, as `--ckpt-format torch` writes them (L3).

A fixture that Megatron-LM's own code wrote proves the layout (tests/fixtures/megatron). The file
holds the arguments of its training, of which everything that decides what the model computes is
looked at, and the tensors of its core's GPTModel with its `local` layers. Its q, k and v lie by
heads, [head][q, k, v], where ours lie [q, k, v][head].
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megagpt.errors import DamageError, UsageError
from megagpt.hub.foreign_model import ForeignModel, saved_by_torch, table
from megagpt.hub.shapes import NANOGPT, refuse_others, whole_number

FILE = "model_optim_rng.pt"
LATEST = "latest_checkpointed_iteration.txt"
_NAMES = {
    "embedding.word_embeddings.weight": "wte.weight",
    "embedding.position_embeddings.weight": "wpe.weight",
    "decoder.final_layernorm.": "ln_f.",
    "decoder.layers.": "h.",
    ".input_layernorm.": ".ln_1.",
    ".pre_mlp_layernorm.": ".ln_2.",
    ".self_attention.linear_qkv.": ".attn.c_attn.",
    ".self_attention.linear_proj.": ".attn.c_proj.",
    ".mlp.linear_fc1.": ".mlp.c_fc.",
    ".mlp.linear_fc2.": ".mlp.c_proj.",
}
_COMPUTED: dict[str, tuple[object, ...]] = {
    "tensor_model_parallel_size": (1,),
    "pipeline_model_parallel_size": (1,),
    "position_embedding_type": ("learned_absolute",),
    "normalization": ("LayerNorm",),
    "layernorm_epsilon": (1e-5,),
    "layernorm_zero_centered_gamma": (False,),
    "add_bias_linear": (True,),
    "swiglu": (False,),
    "squared_relu": (False,),
    "quick_geglu": (False,),
    "group_query_attention": (False,),
    "multi_latent_attention": (False,),
    "attention_output_gate": (False,),
    "qk_layernorm": (False,),
    "qk_l2_norm": (False,),
    "softmax_type": ("vanilla",),
    "apply_residual_connection_post_layernorm": (False,),
    "untie_embeddings_and_output_weights": (False,),
    "use_rotary_position_embeddings": (False,),
    "window_size": (None,),
    "num_experts": (None,),
    "mtp_num_layers": (None,),
    "scale_embeddings": (False, None),
}
"""Argument -> values with which the model computes what ours does."""


class _Inert:
    """Stands for every class of others in a pickle: keeps its state and does nothing."""

    def __new__(cls, *_: object) -> "_Inert":
        return object.__new__(cls)

    def __init__(self, *_: object) -> None:
        pass


def megatron_file(folder: Path) -> Path | None:
    """The file of a folder that Megatron-LM trained into; None where it did not.

    Raises UsageError for a form of checkpoint that is not read.
    """
    if (folder / LATEST).exists():
        latest = (folder / LATEST).read_text(errors="replace").strip()
        if not latest.isdecimal() and latest != "release":
            raise DamageError(f"{folder / LATEST}: holds {latest!r}, no iteration; copy it again")
        folder = folder / (latest if latest == "release" else f"iter_{int(latest):07d}")
    elif not any((folder / name).exists() for name in ("mp_rank_00", ".metadata", "common.pt")):
        return None
    ranks = sorted(path.name for path in folder.glob("mp_rank_*"))
    if ranks == ["mp_rank_00"] and (folder / "mp_rank_00" / FILE).exists():
        return folder / "mp_rank_00" / FILE
    found = f"the ranks {', '.join(ranks)}" if ranks else "no mp_rank_00, but another format"
    raise UsageError(
        f"{folder}: holds {found}; only one rank of --ckpt-format torch is read: let Megatron-LM's "
        "tools/checkpoint/convert.py write it anew with a tensor and pipeline size of 1"
    )


def open_megatron(path: Path) -> ForeignModel:
    """The model in a model_optim_rng.pt. Raises UsageError that names what our model cannot
    compute, DamageError for a file that is not readable."""
    # Classes of others are made inert, and nothing is executed.
    tree = saved_by_torch(path, stand_in=_Inert)
    if not isinstance(tree, dict):
        raise UsageError(f"{path}: holds {type(tree).__name__}, not a checkpoint of Megatron-LM")
    state = table(tree.get("model", {}), path)
    if set(tree) & {"language_model", "module"} or "language_model" in state:
        raise UsageError(
            f"{path}: language_model: is the layout before Megatron-LM's core, which Megatron-"
            "DeepSpeed has too and which is not read; let Megatron-LM's "
            "tools/checkpoint/convert.py write it for its core, or give it as a folder of "
            "transformers"
        )
    try:
        args = vars(tree["args"])
        version = tree["checkpoint_version"]
        config = _config(args, state, path)
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: no checkpoint of Megatron-LM ({error} is missing)") from None
    if version != 3.0:
        raise UsageError(f"{path}: checkpoint_version = {version}: must be 3.0")
    names = {_name(name): name for name in state if not name.endswith("._extra_state")}

    def read(name: str) -> Tensor:
        found: Tensor = state[names[name]]
        return _by_letter(found, config["n_head"]) if ".attn.c_attn." in name else found

    return ForeignModel(path=path, config=config, names=frozenset(names), read=read)


def _config(args: Mapping[str, Any], state: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """As a config.json of GPT-2 says it."""
    width, heads = (
        whole_number(args, key, str(path), "args.")
        for key in ("hidden_size", "num_attention_heads")
    )
    computed = _COMPUTED | {"ffn_hidden_size": (None, 4 * width)}
    computed |= {"kv_channels": (None, width // heads)}
    refuse_others(args, computed, f"{path}: args.")
    # The fused form of its GELU is the tanh approximation, the other is GELU itself.
    tanh = args["bias_gelu_fusion"] or args.get("openai_gelu")
    return {
        "model_type": NANOGPT,
        "n_layer": args["num_layers"],
        "n_head": heads,
        "n_embd": width,
        "n_positions": args["max_position_embeddings"],
        "vocab_size": len(state["embedding.word_embeddings.weight"]),
        "activation_function": "gelu_new" if tanh else "gelu",
        "attn_pdrop": args["attention_dropout"],
        "resid_pdrop": args["hidden_dropout"],
        "embd_pdrop": args["hidden_dropout"],
    }


def _name(name: str) -> str:
    """transformers' name of a tensor of Megatron-LM's; its own where it is none of GPT-2's."""
    for theirs, ours in _NAMES.items():
        name = name.replace(theirs, ours)
    return f"transformer.{name}" if re.match(r"(wte|wpe|ln_f|h\.\d+)\.", name) else name


def _by_letter(whole: Tensor, heads: int) -> Tensor:
    """Rows [head][q, k, v] as [q, k, v][head]."""
    parts = whole.reshape(heads, 3, -1, *whole.shape[1:])
    return parts.transpose(0, 1).reshape(whole.shape)
