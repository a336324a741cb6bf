"""Parameters and floating-point operations of a model, as plain arithmetic (L0, stdlib only).

Counted from the structure, matrix by matrix; a test holds each figure against the modules that
`megagpt.model` builds, so that MFU cannot drift from the model.

Conventions. A multiplication and an addition are 2 FLOPs. A backward pass costs twice its forward
pass. Only matrix products count: norms, GELU, softmax, dropout and the optimiser do not, nor does
the padding of the vocabulary, nor looking up an embedding.

- *Model FLOPs* (MFU) are what the mathematics needs: recompute = "none".
- *Hardware FLOPs* (HFU) add the second forward pass of recomputed blocks: recompute = "full"
  (Narayanan et al. 2021, equation 3: 4 passes over the layers, 3 over the logits).
- causal = "full" counts every dense query as seeing n_ctx keys, as PaLM, Megatron-LM, nanoGPT and
  llm-foundry do; causal = "halved" counts the keys that it does see, (n_ctx + 1) / 2 on average.
  A banded query sees min(band_width, n_ctx) keys in full, and fewer at the start when halved.
- *PF-days* are what GPT-3's Table D.1 prints: 6 FLOPs for each parameter, embeddings among them,
  and each token, without attention, over 10^15 x 86,400. The scaling laws of its figure 3.1 leave
  the embeddings out: a figure for them is called "PF-days without embeddings".
"""

from typing import Any

from megagpt.config.presets import ModelConfig

PF_DAY = 1e15 * 86_400
"""FLOPs of a petaflop/s-day."""


def pf_days(n_parameters: int, tokens: Any) -> Any:
    """PF-days of training so many parameters on so many tokens, a number or an array of them."""
    return 6.0 * n_parameters * tokens / PF_DAY


def parameters(config: ModelConfig) -> int:
    """Parameters of the model, padding of the vocabulary included, a tied matrix counted once."""
    return sum(parameters_by_kind(config).values())


def parameters_by_kind(config: ModelConfig) -> dict[str, int]:
    """The same by kind: wte, wpe, attention, mlp, norms, head (0 where it is wte itself),
    classifier."""
    d, layers = config.d_model, config.n_layer
    bias = int(config.has_bias)
    norms = 2 * layers + (config.family != "gpt1")
    return {
        "wte": config.embedding_rows * d,
        "wpe": config.positions * d,
        "attention": layers * (3 * d * d + d * d + bias * (3 * d + d)),
        "mlp": layers * (2 * d * config.d_ff + bias * (config.d_ff + d)),
        "norms": norms * (1 + bias) * d,
        "head": 0 if config.tied else config.head_rows * d,
        "classifier": config.classes * (d + 1),
    }


def layer_parameters(config: ModelConfig) -> int:
    """Parameters of one block: attention, MLP and their two norms."""
    kinds = parameters_by_kind(config)
    norms = 2 * (1 + config.has_bias) * config.d_model
    return (kinds["attention"] + kinds["mlp"]) // config.n_layer + norms


def flops_per_token(
    config: ModelConfig,
    recompute: str = "none",
    causal: str = "full",
    recompute_every: int = 1,
) -> float:
    """FLOPs of training on one token (forward and backward) at the model's full context.

    `recompute` none gives model FLOPs, full hardware FLOPs with every `recompute_every`-th block
    computed again; `causal` is full or halved. See the conventions above.
    """
    assert recompute in ("none", "full") and causal in ("full", "halved"), (recompute, causal)
    blocks = [layer_flops(config, index, causal) for index in range(config.n_layer)]
    again = sum(blocks[::recompute_every]) if recompute == "full" else 0.0
    return 3.0 * (sum(blocks) + head_flops(config)) + again


def layer_flops(config: ModelConfig, index: int, causal: str = "full") -> float:
    """FLOPs of one token's forward pass through block `index`."""
    d = config.d_model
    matrices = 4 * d * d + 2 * d * config.d_ff
    # Each key costs a score and a weighted value, d_model multiplications and additions both.
    return 2.0 * matrices + 4.0 * d * visible_keys(config, index, causal)


def head_flops(config: ModelConfig) -> float:
    """FLOPs of one token's logits, forward."""
    return 2.0 * config.vocab_size * config.d_model


def visible_keys(config: ModelConfig, index: int, causal: str = "full") -> float:
    """Keys that a query of block `index` is counted to see, on average over the context."""
    t, band = config.positions, config.band(index)
    w = t if band is None else min(band, t)
    if causal == "full":
        return float(w)
    # The first w queries see 1 .. w keys, the others w.
    return (w * (w + 1) / 2 + (t - w) * w) / t
