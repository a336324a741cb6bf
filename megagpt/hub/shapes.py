"""config.json of transformers' classes into a ModelConfig, and back (L3).

What our model cannot compute is refused by the key that asks for it: a key is never ignored.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megagpt.config.presets import ModelConfig
from megagpt.errors import UsageError

NANOGPT = "nanogpt"
"""The model_type that we give to nanoGPT's ckpt.pt and Megatron-LM's checkpoints: GPT-2's names,
matrices as (out, in)."""
_GPT2 = {
    "vocab_size": "n_embedding",
    "n_positions": "n_ctx",
    "n_embd": "d_model",
    "n_layer": "n_layer",
    "n_head": "n_head",
}
_NEO = {
    "vocab_size": "n_embedding",
    "max_position_embeddings": "n_ctx",
    "hidden_size": "d_model",
    "num_layers": "n_layer",
    "num_heads": "n_head",
}
_GELU = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
}
_AS_GPT2 = {
    "n_inner": None,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}
_PATTERN = {"window_size": 256, "attention_types": [[["global", "local"], 12]]}


@dataclass(frozen=True, kw_only=True)
class ForeignClass:
    """A class of transformers that computes what our model does, as its config.json says it."""

    name: str = ""
    keys: Mapping[str, str] = field(default_factory=lambda: _GPT2)
    """Its name of a size -> that of ModelConfig."""
    sizes: tuple[int, ...] = ()
    """What the class takes for `keys`, in their order, where a config.json leaves them out."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """The same for other keys."""
    activation_key: str = "activation_function"
    activations: Mapping[str, str] = field(default_factory=lambda: _GELU)
    """Its name of the activation -> model.activation; the first is its default."""
    dropouts: tuple[str, ...] = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
    tied: bool = True

    @property
    def defaults(self) -> dict[str, Any]:
        """What the class takes for a key that its config.json leaves out."""
        sizes = dict(zip(self.keys, self.sizes, strict=False))
        activation = {self.activation_key: next(iter(self.activations))}
        return {**sizes, **activation, "tie_word_embeddings": self.tied, **self.more}


CLASSES = {
    "gpt2": ForeignClass(name="GPT2LMHeadModel", sizes=(50_257, 1024, 768, 12, 12)),
    "gpt_neo": ForeignClass(
        name="GPTNeoForCausalLM",
        keys=_NEO,
        sizes=(50_257, 2048, 2048, 24, 16),
        more=_PATTERN,
        dropouts=("resid_dropout", "embed_dropout", "attention_dropout"),
    ),
    "openai-gpt": ForeignClass(
        name="OpenAIGPTLMHeadModel",
        sizes=(40_478, 512, 768, 12, 12),
        activation_key="afn",
        # The class's own table calls the tanh approximation "gelu".
        activations={"gelu": "gelu_tanh"},
    ),
    "imagegpt": ForeignClass(
        name="ImageGPTForCausalImageModeling",
        sizes=(513, 1024, 512, 24, 8),
        activations={"quick_gelu": "gelu_tanh"},
        tied=False,
    ),
}
"""By model_type."""
_NANOGPT = ForeignClass(more={"activation_function": "gelu"})


def read_config(theirs: Mapping[str, Any], name: str) -> ModelConfig:
    """The model that a config.json describes. `name` stands for the file in messages.

    Raises UsageError that names the first key which asks for what our model cannot compute.
    """
    kind = theirs.get("model_type")
    cls = _NANOGPT if kind == NANOGPT else CLASSES.get(str(kind))
    if cls is None:
        raise UsageError(
            f"{name}: model_type = {kind!r}: must be one of {', '.join(CLASSES)}; no other "
            "model is one of ours"
        )
    values = {**cls.defaults, **theirs}
    sizes: dict[str, Any] = {
        ours: whole_number(values, key, name) for key, ours in cls.keys.items()
    }
    _refuse(cls, kind, values, sizes["d_model"], name)
    more: dict[str, Any] = {"dropout": _dropout(cls, values, name)}
    if kind == "gpt_neo":
        more |= _bands(values, sizes["n_layer"], name)
    if kind == "openai-gpt":
        more["family"] = "gpt1"
    vocab_size = sizes.pop("n_embedding")
    if kind == "imagegpt":
        more["family"] = "igpt"
        vocab_size -= 1  # the start token is counted there
    else:
        more["activation"] = cls.activations[values[cls.activation_key]]
    config = ModelConfig(vocab_size=vocab_size, **sizes, **more)
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


def _refuse(
    cls: ForeignClass, kind: Any, values: Mapping[str, Any], d_model: int, name: str
) -> None:
    """Raises UsageError for a key whose value our model cannot compute."""
    inverse = values.get("scale_attn_by_inverse_layer_idx", False)
    rules: dict[str, tuple[object, ...]] = {
        cls.activation_key: tuple(cls.activations),
        "layer_norm_epsilon": (1e-5,),
        "n_inner": (None, 4 * d_model),
        "intermediate_size": (None, 4 * d_model),
        "add_cross_attention": (False,),
        "is_encoder_decoder": (False,),
        "tie_word_embeddings": (cls.tied,),
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


def _dropout(cls: ForeignClass, values: Mapping[str, Any], name: str) -> float:
    """The three rates, where they are one; 0 where they differ. It never changes the logits."""
    # nanoGPT has one rate alone.
    rates = [values.get(key, values.get("dropout", 0.0)) for key in cls.dropouts]
    for key, rate in zip(cls.dropouts, rates, strict=True):
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
            f"model.attention = {list(config.attention)}: {CLASSES[kind].name} has dense layers "
            "only, so transformers cannot compute this model"
        )
    if config.family == "gpt1" and config.activation != "gelu_tanh":
        raise UsageError(
            f'model.activation = {config.activation!r}: {CLASSES[kind].name} has "gelu_tanh" '
            "only, so transformers cannot compute this model"
        )
    return kind


def write_config(config: ModelConfig, end: int | None, dtype: str) -> dict[str, Any]:
    """The object of a config.json. `end`: the id of END-OF-DOCUMENT, None where the tokenizer is
    not known; dtype: torch's name of the weights'."""
    kind = model_type(config)
    cls = CLASSES[kind]
    same = [theirs for theirs, ours in cls.activations.items() if ours == config.activation]
    tree: dict[str, Any] = {
        "model_type": kind,
        "architectures": [cls.name],
        "dtype": dtype,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "tie_word_embeddings": cls.tied,
        "bos_token_id": end,
        "eos_token_id": end,
        "use_cache": True,
        **{theirs: getattr(config, ours) for theirs, ours in cls.keys.items()},
        # Image GPT has one of its own, whatever model.activation says.
        cls.activation_key: [*same, *cls.activations][0],
        # Written even where it is 0: transformers' default is 0.1.
        **dict.fromkeys(cls.dropouts, config.dropout),
    }
    if kind == "gpt_neo":
        return tree | _bands_of(config)
    # transformers dropped it, llama.cpp's converter reads it.
    tree["n_ctx"] = config.n_ctx
    return tree if kind == "openai-gpt" else tree | _AS_GPT2


def _bands_of(config: ModelConfig) -> dict[str, Any]:
    layers = ["global" if config.band(i) is None else "local" for i in range(config.n_layer)]
    return {
        "intermediate_size": None,
        "window_size": config.band_width,
        "attention_types": [[layers, 1]],
        "attention_layers": layers,
    }
