"""The layers of every GPT, and the list of them that is the model.

Letters: B batch, T sequence, D width of the residual stream, H heads of this rank, E = D / heads.

`layers(config)` names each layer, its class and its arguments, in order. The plain model
(`megagpt.model.gpt.GPT`) and a pipeline of stages are both built from this list, so that they
cannot differ. Every layer maps one tensor to one tensor. A parameter's canonical name is its
layer's name, a dot and its name within the layer, as in GPT-2: ``h.3.attn.c_attn.weight``.

No constructor draws a number: parameters are `torch.empty`, to be filled by
`megagpt.model.initialise` or from a checkpoint, so building costs nothing, on any device.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.config.presets import ModelConfig
from megagpt.errors import UsageError
from megagpt.model.kernels.attention import attend
from megagpt.model.kernels.loss import head_logits, head_loss


class Linear(nn.Linear):
    """nn.Linear with empty parameters: weight (d_out, d_in)."""

    def reset_parameters(self) -> None:
        """Leave the parameters empty."""


class Embedding(nn.Module):
    """Token embedding: ids (B, T) int64 -> (B, T, D); where tied, its weight is the head's too.

    `rows` counts the padding too; `vocab_size` is the number of tokens that may be scored.
    """

    def __init__(self, rows: int, d_model: int, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.weight = nn.Parameter(torch.empty(rows, d_model))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class Head(nn.Module):
    """Image GPT's output matrix, not tied to the embedding; applied by `Parts.head_loss`."""

    def __init__(self, rows: int, d_model: int, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.weight = nn.Parameter(torch.empty(rows, d_model))

    def forward(self, hidden: Tensor) -> Tensor:
        return head_logits(self, hidden)


@dataclass(frozen=True)
class Parts:
    """The classes and functions that a split over ranks replaces; the defaults are unsplit.

    Constructors take the sizes of the whole model and make this rank's share.
    """

    column: type[nn.Module] = Linear
    """(d_in, d_out, bias=...): c_attn and c_fc, split by output. c_attn's rows are [q; k; v]."""
    row: type[nn.Module] = Linear
    """(d_in, d_out, bias=...): c_proj, split by input; adds its bias after the reduction."""
    embedding: type[nn.Module] = Embedding
    """(rows, d_model, vocab_size): wte."""
    head: type[nn.Module] = Head
    """(rows, d_model, vocab_size): the output matrix of a model that does not tie it to wte."""
    head_loss: Callable[[nn.Module, Tensor, Tensor], Tensor] = head_loss
    """(module, hidden, targets) -> mean loss, where module is wte or an untied head."""
    head_logits: Callable[[nn.Module, Tensor], Tensor] = head_logits
    """(module, hidden) -> logits over the vocabulary without padding."""


@dataclass(frozen=True)
class Layer:
    """One layer of the list: `cls(**kwargs)` builds it."""

    name: str
    """Canonical prefix of its parameters' names: wte, wpe, h.0 ..., ln_f, head."""
    cls: type[nn.Module]
    kwargs: dict[str, Any] = field(default_factory=dict)
    tied_to: str | None = None
    """The layer whose module this one is, when it has no parameters of its own."""
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None
    """The head: (module, hidden, targets) -> loss, in place of the module's own forward."""


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm (eps 1e-5) with empty parameters."""

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model, eps=1e-5)

    def reset_parameters(self) -> None:
        """Leave the parameters empty."""


class GainNorm(nn.Module):
    """Image GPT's norm: a gain, no bias, no subtraction of the mean; eps 1e-5."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_model))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, 1e-5)


def norm_class(config: ModelConfig) -> type[LayerNorm] | type[GainNorm]:
    """The family's norm; its constructor takes d_model."""
    return GainNorm if config.family == "igpt" else LayerNorm


class Positions(nn.Module):
    """Learned positions, then embedding dropout: (B, T, D) -> (B, T, D)."""

    def __init__(self, n_ctx: int, d_model: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.weight = nn.Parameter(torch.empty(n_ctx, d_model))

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        end = start + x.shape[1]
        if end > self.weight.shape[0]:
            raise UsageError(
                f"{end} positions, but the model's context is {self.weight.shape[0]} tokens: "
                "shorten the text, or train with a larger n_ctx"
            )
        x = x + self.weight[start:end]
        return F.dropout(x, self.dropout, self.training)


class KeyValues:
    """Keys and values of one layer's past positions; a banded layer keeps those still in sight."""

    def __init__(self, band: int | None, n_ctx: int) -> None:
        self.band = band
        self.n_ctx = n_ctx
        self.n = 0
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add (B, H, T, E) keys and values; return all that the T new queries may see."""
        if self.band is not None:
            if self.k is not None and self.v is not None:
                k, v = torch.cat([self.k, k], 2), torch.cat([self.v, v], 2)
            kept = min(self.band - 1, k.shape[2])
            # A copy, so that the past does not keep the whole of this call's tensors alive.
            self.k = k[:, :, k.shape[2] - kept :].clone()
            self.v = v[:, :, v.shape[2] - kept :].clone()
            return k, v
        if self.k is None or self.v is None:
            b, h, _, e = k.shape
            self.k, self.v = k.new_empty(b, h, self.n_ctx, e), v.new_empty(b, h, self.n_ctx, e)
        end = self.n + k.shape[2]
        self.k[:, :, self.n : end] = k
        self.v[:, :, self.n : end] = v
        self.n = end
        return self.k[:, :, :end], self.v[:, :, :end]


class Attention(nn.Module):
    """Multi-head causal attention, dense or banded: (B, T, D) -> (B, T, D)."""

    def __init__(self, config: ModelConfig, index: int, parts: Parts) -> None:
        super().__init__()
        d = config.d_model
        self.d_head = config.d_head
        self.band = config.band(index)
        self.dropout = config.dropout
        self.c_attn = parts.column(d, 3 * d, bias=config.has_bias)
        self.c_proj = parts.row(d, d, bias=config.has_bias)

    def forward(self, x: Tensor, past: KeyValues | None = None) -> Tensor:
        b, t, _ = x.shape
        qkv = self.c_attn(x).view(b, t, 3, -1, self.d_head)  # (B, T, 3, H, E): H by its width
        q, k, v = (z.transpose(1, 2) for z in qkv.unbind(2))  # each (B, H, T, E)
        if past is not None:
            k, v = past.append(k, v)
        y = attend(q, k, v, self.band, self.dropout if self.training else 0.0)
        y = self.c_proj(y.transpose(1, 2).reshape(b, t, -1))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    """Two linear layers around GELU, four times as wide inside: (B, T, D) -> (B, T, D)."""

    def __init__(self, config: ModelConfig, parts: Parts) -> None:
        super().__init__()
        d = config.d_model
        self.quick = config.family == "igpt"
        self.dropout = config.dropout
        self.c_fc = parts.column(d, config.d_ff, bias=config.has_bias)
        self.c_proj = parts.row(config.d_ff, d, bias=config.has_bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)
        # GPT-1 to 3: GELU's tanh approximation. Image GPT: its logistic approximation.
        x = x * torch.sigmoid(1.702 * x) if self.quick else F.gelu(x, approximate="tanh")
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    """One transformer block: (B, T, D) -> (B, T, D)."""

    def __init__(self, config: ModelConfig, index: int, parts: Parts) -> None:
        super().__init__()
        self.post = config.family == "gpt1"
        self.ln_1 = norm_class(config)(config.d_model)
        self.attn = Attention(config, index, parts)
        self.ln_2 = norm_class(config)(config.d_model)
        self.mlp = MLP(config, parts)

    def forward(self, x: Tensor, past: KeyValues | None = None) -> Tensor:
        if self.post:  # GPT-1: LayerNorm after each sum
            x = self.ln_1(x + self.attn(x, past))
            return self.ln_2(x + self.mlp(x))
        x = x + self.attn(self.ln_1(x), past)
        return x + self.mlp(self.ln_2(x))


def layers(config: ModelConfig, parts: Parts = Parts()) -> list[Layer]:  # noqa: B008
    """The model as a list: wte, wpe, h.0 .. h.{L-1}, ln_f (not in GPT-1), head.

    wte takes ids (B, T); every other layer the hidden state (B, T, D). The head's `loss` takes
    its module (wte's own where `tied_to` says so), the hidden state and the targets (B, T).
    """
    d = config.d_model
    tokens = {"rows": config.embedding_rows, "d_model": d, "vocab_size": config.vocab_size}
    positions = {"n_ctx": config.n_ctx, "d_model": d, "dropout": config.dropout}
    chain = [Layer("wte", parts.embedding, tokens), Layer("wpe", Positions, positions)]
    for index in range(config.n_layer):
        block = {"config": config, "index": index, "parts": parts}
        chain.append(Layer(f"h.{index}", Block, block))
    if config.family != "gpt1":
        chain.append(Layer("ln_f", norm_class(config), {"d_model": d}))
    if config.tied:
        chain.append(Layer("head", parts.embedding, tokens, "wte", parts.head_loss))
    else:
        head = {"rows": config.head_rows, "d_model": d, "vocab_size": config.vocab_size}
        chain.append(Layer("head", parts.head, head, None, parts.head_loss))
    return chain
