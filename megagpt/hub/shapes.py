"""config.json of transformers' classes into a ModelConfig, and back (L3).

What our model cannot compute is refused by the key that asks for it: a key is never ignored.
"""

import math
from collections.abc import Mapping
from typing import Any

from megagpt.config.presets import ModelConfig
from megagpt.errors import UsageError

ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "gpt_neo": "GPTNeoForCausalLM",
    "openai-gpt": "OpenAIGPTLMHeadModel",
    "imagegpt": "ImageGPTForCausalImageModeling",
}
"""model_type -> the class of transformers that computes what our model does."""
NANOGPT = "nanogpt"
"""The model_type that we give to nanoGPT's ckpt.pt and Megatron-LM's checkpoints: GPT-2's names,
matrices as (out, in)."""

_GPT2 = {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024, "vocab_size": 50257}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {**_GPT2, "activation_function": "gelu_new", "tie_word_embeddings": True},
    NANOGPT: {"activation_function": "gelu"},
    "gpt_neo": {
        "num_layers": 24,
        "num_heads": 16,
        "hidden_size": 2048,
        "max_position_embeddings": 2048,
        "vocab_size": 50257,
        "window_size": 256,
        "attention_types": [[["global", "local"], 12]],
        "activation_function": "gelu_new",
        "tie_word_embeddings": True,
    },
    "openai-gpt": {**_GPT2, "n_positions": 512, "vocab_size": 40478, "afn": "gelu"},
    "imagegpt": {
        "n_layer": 24,
        "n_head": 8,
        "n_embd": 512,
        "n_positions": 1024,
        "vocab_size": 513,
        "activation_function": "quick_gelu",
        "tie_word_embeddings": False,
    },
}
"""What a class of transformers takes for a key that its config.json leaves out."""
_GELU = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
}
_ACTIVATIONS: dict[str, dict[str, str]] = {
    "gpt2": _GELU,
    NANOGPT: _GELU,
    "gpt_neo": _GELU,
    # The class's own table calls the tanh approximation "gelu".
    "openai-gpt": {"gelu": "gelu_tanh"},
    "imagegpt": {"quick_gelu": "gelu_tanh"},
}
"""model_type -> name of the activation -> model.activation (Image GPT has one of its own)."""
_SIZES = {
    "n_layer": ("n_layer", "num_layers"),
    "n_head": ("n_head", "num_heads"),
    "d_model": ("n_embd", "hidden_size"),
    "n_ctx": ("n_positions", "max_position_embeddings"),
    "vocab_size": ("vocab_size",),
}
_DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
_NEO_DROPOUTS = ("resid_dropout", "embed_dropout", "attention_dropout")


def read_config(theirs: Mapping[str, Any], name: str) -> ModelConfig:
    """The model that a config.json describes. `name` stands for the file in messages.

    Raises UsageError that names the first key which asks for what our model cannot compute.
    """
    kind = theirs.get("model_type")
    if kind not in _DEFAULTS:
        raise UsageError(
            f"{name}: model_type = {kind!r}: must be one of {', '.join(ARCHITECTURES)}; no other "
            "model is one of ours"
        )
    values = {**_DEFAULTS[kind], **theirs}
    sizes: dict[str, Any] = {
        ours: whole_number(values, next((key for key in keys if key in values), keys[0]), name)
        for ours, keys in _SIZES.items()
    }
    _refuse(kind, values, sizes["d_model"], name)
    more: dict[str, Any] = {"dropout": _dropout(values, name)}
    if kind == "gpt_neo":
        more |= _bands(values, sizes["n_layer"], name)
    if kind == "openai-gpt":
        more["family"] = "gpt1"
    if kind == "imagegpt":
        more["family"] = "igpt"
        sizes["vocab_size"] -= 1  # the start token is counted there
    else:
        more["activation"] = _ACTIVATIONS[kind][values[_activation_key(kind)]]
    config = ModelConfig(**sizes, **more)
    for problem in config.problems():
        raise UsageError(f"{name}: {problem}")
    return config


def query_scale(theirs: Mapping[str, Any], config: ModelConfig, layer: int) -> float:
    """What the rows of q of a layer are multiplied by on import: our scores are divided by
    sqrt(d_head) and by nothing else."""
    if theirs["model_type"] == "gpt_neo" or theirs.get("scale_attn_weights") is False:
        return math.sqrt(config.d_head)
    return 1.0 / (layer + 1) if theirs.get("scale_attn_by_inverse_layer_idx") else 1.0


def whole_number(values: Mapping[str, Any], key: str, name: str, where: str = "") -> int:
    """A size. `name` stands for the file in the message, `where` for what holds the key."""
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UsageError(f"{name}: {where}{key} = {value!r}: must be a whole number of 1 or more")
    return value


def _activation_key(kind: str) -> str:
    return "afn" if kind == "openai-gpt" else "activation_function"


def _refuse(kind: str, values: Mapping[str, Any], d_model: int, name: str) -> None:
    """Raises UsageError for a key whose value our model cannot compute."""
    inverse = values.get("scale_attn_by_inverse_layer_idx", False)
    rules: dict[str, tuple[object, ...]] = {
        _activation_key(kind): tuple(_ACTIVATIONS[kind]),
        "layer_norm_epsilon": (1e-5,),
        "n_inner": (None, 4 * d_model),
        "intermediate_size": (None, 4 * d_model),
        "add_cross_attention": (False,),
        "is_encoder_decoder": (False,),
        "tie_word_embeddings": (kind != "imagegpt",),
        "scale_attn_weights": (True,) if inverse else (True, False),
        "scale_attn_by_inverse_layer_idx": (True, False) if kind == "gpt2" else (False,),
        "quantization_config": (None,),
        "pruned_heads": (None, {}),
    }
    refuse_others(values, rules, f"{name}: ")


def refuse_others(
    values: Mapping[str, Any], computed: Mapping[str, tuple[object, ...]], where: str
) -> None:
    """Raises UsageError for the first of `values` that is there and none of those that our model
    computes. where: what stands before its key in the message."""
    for key, known in computed.items():
        if key in values and values[key] not in known:
            raise UsageError(
                f"{where}{key} = {values[key]!r}: our model computes only "
                f"{', '.join(map(repr, known))}; its logits would be others"
            )


def _dropout(values: Mapping[str, Any], name: str) -> float:
    """The three rates, where they are one; 0 where they differ. It never changes the logits."""
    keys = _NEO_DROPOUTS if values["model_type"] == "gpt_neo" else _DROPOUTS
    # nanoGPT has one rate alone.
    rates = [values.get(key, values.get("dropout", 0.0)) for key in keys]
    for key, rate in zip(keys, rates, strict=True):
        if not isinstance(rate, int | float):
            raise UsageError(f"{name}: {key} = {rate!r}: must be a number")
    return float(rates[0]) if len(set(rates)) == 1 else 0.0


def _bands(values: Mapping[str, Any], n_layer: int, name: str) -> dict[str, Any]:
    """attention and band_width of GPT-Neo's attention_types."""
    kinds = {"global": "dense", "local": "banded"}
    try:
        pattern = [kinds[k] for names, times in values["attention_types"] for k in names * times]
    except (KeyError, TypeError, ValueError):
        pattern = []
    if len(pattern) != n_layer:
        raise UsageError(
            f'{name}: attention_types = {values["attention_types"]!r}: must name "global" or '
            f'"local" for each of the {n_layer} layers'
        )
    period = next(n for n in range(1, n_layer + 1) if pattern == (pattern[:n] * n_layer)[:n_layer])
    width = whole_number(values, "window_size", name)
    return {"attention": tuple(pattern[:period]), "band_width": width}


# --- going out ----------------------------------------------------------------------------------


def model_type(config: ModelConfig) -> str:
    """The model_type that computes what `config` does. Raises UsageError where there is none."""
    if config.classes:
        raise UsageError(
            f"model.classes = {config.classes}: no class of transformers has this classifier "
            "behind this model"
        )
    banded = any((config.band(i) or config.n_ctx) < config.n_ctx for i in range(config.n_layer))
    if config.family == "gpt2":
        return "gpt_neo" if banded else "gpt2"
    kind = {"gpt1": "openai-gpt", "igpt": "imagegpt"}[config.family]
    if banded:
        raise UsageError(
            f"model.attention = {list(config.attention)}: {ARCHITECTURES[kind]} has dense layers "
            "only, so transformers cannot compute this model"
        )
    if config.family == "gpt1" and config.activation != "gelu_tanh":
        raise UsageError(
            f'model.activation = {config.activation!r}: {ARCHITECTURES[kind]} has "gelu_tanh" '
            "only, so transformers cannot compute this model"
        )
    return kind


def write_config(config: ModelConfig, end: int | None, dtype: str) -> dict[str, Any]:
    """The object of a config.json. `end`: the id of END-OF-DOCUMENT, None where the tokenizer is
    not known; dtype: torch's name of the weights'."""
    kind = model_type(config)
    tree = {
        "model_type": kind,
        "architectures": [ARCHITECTURES[kind]],
        "dtype": dtype,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "tie_word_embeddings": config.tied,
        "bos_token_id": end,
        "eos_token_id": end,
        "use_cache": True,
    }
    return tree | (_neo(config) if kind == "gpt_neo" else _gpt(config, kind))


def _gpt(config: ModelConfig, kind: str) -> dict[str, Any]:
    tree: dict[str, Any] = {
        "vocab_size": config.n_embedding,
        "n_positions": config.n_ctx,
        # transformers dropped it, llama.cpp's converter reads it.
        "n_ctx": config.n_ctx,
        "n_embd": config.d_model,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        # Written even where it is 0: transformers' default is 0.1.
        **dict.fromkeys(_DROPOUTS, config.dropout),
    }
    if kind == "openai-gpt":
        return {**tree, "afn": "gelu"}
    gelu = "gelu" if config.activation == "gelu" else "gelu_new"
    return tree | {
        "n_inner": None,
        "activation_function": "quick_gelu" if kind == "imagegpt" else gelu,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
    }


def _neo(config: ModelConfig) -> dict[str, Any]:
    layers = ["global" if config.band(i) is None else "local" for i in range(config.n_layer)]
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.n_ctx,
        "hidden_size": config.d_model,
        "num_layers": config.n_layer,
        "num_heads": config.n_head,
        "intermediate_size": None,
        "window_size": config.band_width,
        "attention_types": [[layers, 1]],
        "attention_layers": layers,
        "activation_function": "gelu" if config.activation == "gelu" else "gelu_new",
        **dict.fromkeys(_NEO_DROPOUTS, config.dropout),
    }
