"""The model: the layers of every GPT, the list of them, and that list chained.

Letters: B batch, T sequence, D width of the residual stream, H heads of this rank, E = D / heads,
V vocabulary, S keys that a query may see.

`layers(config)` names each layer, its class and its arguments, in order. The plain model (`GPT`)
and a pipeline of stages are both built from this list, so that they cannot differ. Every layer
maps one tensor to one tensor. A parameter's canonical name is its layer's name, a dot and its name
within the layer, as in GPT-2: ``h.3.attn.c_attn.weight``.

The life of a model:
1) built empty: no constructor draws a number, so that building costs nothing, on any device;
2) filled by `megagpt.model.initialise` or from a checkpoint;
3) moved to its device; a banded layer makes its block mask there at its first forward pass.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megagpt.config.presets import ModelConfig
from megagpt.model.cache import Cache, KeyValues, beyond_context
from megagpt.model.classifier import Classifier, classifier_loss, states_at_extract
from megagpt.model.kernels.attention import attend, attention_form, make_block_mask
from megagpt.model.kernels.loss import head_logits, head_loss

SCORED_LOGITS = 1 << 25
"""Logits that `GPT.target_logits` holds at a time (128 MiB in fp32)."""

# --- layers with parameters ----------------------------------------------------------------------


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
        return F.embedding(ids, self.weight)  # (B, T) -> (B, T, D)


class Head(Embedding):
    """Image GPT's output matrix, not tied to the embedding: (B, T, D) -> (B, T, V)."""

    def forward(self, hidden: Tensor) -> Tensor:
        return head_logits(self, hidden)


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

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        if positions is None:
            if x.shape[1] > self.weight.shape[0]:
                raise beyond_context(x.shape[1], self.weight.shape[0])
            x = x + self.weight[: x.shape[1]]  # (T, D) is added to every sequence
        else:
            x = x + self.weight[positions]  # (B, T) -> (B, T, D)
        return F.dropout(x, self.dropout, self.training)


# --- the list of layers --------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerClasses:
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


def layers(
    config: ModelConfig,
    classes: LayerClasses = LayerClasses(),  # noqa: B008 (frozen)
) -> list[Layer]:
    """The model as a list: wte, wpe, h.0 .. h.{L-1}, ln_f (not in GPT-1), head, and where the model
    has classes the classifier, which reads what the head reads.

    wte takes ids (B, T); every other layer the hidden state (B, T, D). The head's `loss` takes
    its module (wte's own where `tied_to` says so), the hidden state and the targets (B, T).
    """
    d = config.d_model
    tokens = {"rows": config.embedding_rows, "d_model": d, "vocab_size": config.vocab_size}
    positions = {"n_ctx": config.positions, "d_model": d, "dropout": config.dropout}
    chain = [Layer("wte", classes.embedding, tokens), Layer("wpe", Positions, positions)]
    for index in range(config.n_layer):
        block = {"config": config, "index": index, "classes": classes}
        chain.append(Layer(f"h.{index}", Block, block))
    if config.family != "gpt1":
        chain.append(Layer("ln_f", norm_class(config), {"d_model": d}))
    if config.tied:
        chain.append(Layer("head", classes.embedding, tokens, "wte", classes.head_loss))
    else:
        head = {"rows": config.head_rows, "d_model": d, "vocab_size": config.vocab_size}
        chain.append(Layer("head", classes.head, head, None, classes.head_loss))
    if config.classes:
        kwargs = {"d_model": d, "classes": config.classes, "dropout": config.dropout}
        chain.append(Layer("classifier", Classifier, kwargs))
    return chain


# --- a block -------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head causal attention, dense or banded: (B, T, D) -> (B, T, D)."""

    def __init__(self, config: ModelConfig, index: int, classes: LayerClasses) -> None:
        super().__init__()
        d = config.d_model
        self.d_head = config.d_head
        self.n_ctx = config.positions
        self.band = config.band(index)
        self.dropout = config.dropout
        self.c_attn = classes.column(d, 3 * d, bias=config.has_bias)
        self.c_proj = classes.row(d, d, bias=config.has_bias)
        self._mask: Any = None

    def block_mask(self, x: Tensor) -> Any:
        """flex_attention's mask for x (B, T, D), or None where another form is used.

        Only for whole contexts: every other length would cost a compilation of its own. Made once
        for each device, outside of any compiled graph, which would make it again in every step.
        """
        if self.band is None or not self.band < self.n_ctx == x.shape[1]:
            return None
        if attention_form(x.device.type, x.dtype, True, self.dropout, self.d_head) != "flex":
            return None
        if self._mask is None or self._mask.kv_indices.device != x.device:
            self._mask = make_block_mask(self.n_ctx, self.band, x.device)
        return self._mask

    def forward(self, x: Tensor, past: KeyValues | None = None, mask: Any = None) -> Tensor:
        b, t, _ = x.shape
        # H by the width that c_attn has on this rank.
        qkv = self.c_attn(x).view(b, t, 3, -1, self.d_head)  # (B, T, D) -> (B, T, 3, H, E)
        q, k, v = (z.transpose(1, 2) for z in qkv.unbind(2))  # each (B, H, T, E)
        if past is not None:
            y = past.attend(q, k, v)
        else:
            y = attend(q, k, v, self.band, self.dropout if self.training else 0.0, mask)
        y = self.c_proj(y.transpose(1, 2).reshape(b, t, -1))  # (B, H, T, E) -> (B, T, D)
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    """Two linear layers around GELU, four times as wide inside: (B, T, D) -> (B, T, D)."""

    def __init__(self, config: ModelConfig, classes: LayerClasses) -> None:
        super().__init__()
        d = config.d_model
        self.quick = config.family == "igpt"
        self.approximate = "tanh" if config.activation == "gelu_tanh" else "none"
        self.dropout = config.dropout
        self.c_fc = classes.column(d, config.d_ff, bias=config.has_bias)
        self.c_proj = classes.row(config.d_ff, d, bias=config.has_bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)  # (B, T, D) -> (B, T, 4 D)
        # Image GPT: GELU's logistic approximation.
        x = x * torch.sigmoid(1.702 * x) if self.quick else F.gelu(x, approximate=self.approximate)
        return F.dropout(self.c_proj(x), self.dropout, self.training)  # (B, T, D)


class Block(nn.Module):
    """One transformer block: (B, T, D) -> (B, T, D)."""

    def __init__(self, config: ModelConfig, index: int, classes: LayerClasses) -> None:
        super().__init__()
        self.post = config.family == "gpt1"
        self.ln_1 = norm_class(config)(config.d_model)
        self.attn = Attention(config, index, classes)
        self.ln_2 = norm_class(config)(config.d_model)
        self.mlp = MLP(config, classes)

    def forward(self, x: Tensor, past: KeyValues | None = None) -> Tensor:
        # `compute` is what torch.compile replaces: hooks on the block, and its mask, stay outside.
        return self.compute(x, past, None if past is not None else self.attn.block_mask(x))

    def compute(self, x: Tensor, past: KeyValues | None, mask: Any) -> Tensor:
        """The block itself; `mask` is that of its attention."""
        if self.post:  # GPT-1: LayerNorm after each sum
            x = self.ln_1(x + self.attn(x, past, mask))
            return self.ln_2(x + self.mlp(x))
        x = x + self.attn(self.ln_1(x), past, mask)
        return x + self.mlp(self.ln_2(x))


# --- the plain model -----------------------------------------------------------------------------


class GPT(nn.Module):
    """A GPT of any family, built from `layers(config, classes)`; parameters start empty.

    Fill them with `initialise(model.named_parameters(), config, seed)` or from a checkpoint.
    `recompute_every` k > 0 keeps only the input of every k-th block in training and computes
    the block again in the backward pass; 0 keeps everything. Results are bit for bit the same.
    """

    def __init__(
        self,
        config: ModelConfig,
        classes: LayerClasses = LayerClasses(),  # noqa: B008 (frozen)
        recompute_every: int = 0,
    ) -> None:
        super().__init__()
        self.config = config
        self.classes = classes
        self.recompute_every = recompute_every
        chain = [layer for layer in layers(config, classes) if layer.tied_to is None]
        built = {layer.name: layer.cls(**layer.kwargs) for layer in chain}
        self.wte = built["wte"]
        self.wpe = built["wpe"]
        self.h = nn.ModuleList(built[f"h.{i}"] for i in range(config.n_layer))
        self.ln_f = built.get("ln_f", nn.Identity())
        self.head = built.get("head")
        self.classifier = built.get("classifier")

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean loss (fp32 scalar) of ids x (B, T) with targets y (B, T); y < 0 is not scored.

        With classes, x are samples of whole contexts and the last target of each is its class.
        """
        if self.classifier is None:
            return self.classes.head_loss(self._output(), self._hidden(x), y)
        hidden, scores = self._classified(x)
        score = partial(self.classes.head_loss, self._output())
        return classifier_loss(scores, hidden, y, score, self.config.lm_weight)

    def class_scores(self, x: Tensor) -> Tensor:
        """Scores of the classes (B, C) of samples x (B, n_ctx); of the parts where they are chosen
        among."""
        return self._classified(x)[1]

    def _classified(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The last hidden states (B parts, T / parts, D) of samples x (B, T), and their scores."""
        assert self.classifier is not None
        hidden = self._hidden(x.reshape(-1, self.config.positions))
        return hidden, self.classifier(states_at_extract(x, hidden, self.config))

    def logits(self, x: Tensor) -> Tensor:
        """Logits (B, T, V) of ids x (B, T), padding left out; what follows each position."""
        return self.classes.head_logits(self._output(), self._hidden(x))

    @torch.no_grad()
    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        """Loss of each target y (B, T) >= 0 after ids x (B, T), nats: (N,) fp32, row by row."""
        losses = [F.cross_entropy(z, t, reduction="none") for z, t in self.target_logits(x, y)]
        return torch.cat(losses)

    @torch.no_grad()
    def target_logits(self, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(logits (n, V) fp32, targets (n,)) of the targets y (B, T) >= 0 after ids x (B, T), row
        by row, SCORED_LOGITS at a time."""
        scored = y >= 0
        hidden, targets = self._hidden(x)[scored], y[scored]  # (N, D), (N,)
        rows = max(1, SCORED_LOGITS // self.config.vocab_size)
        for h, t in zip(hidden.split(rows), targets.split(rows), strict=True):
            yield self.classes.head_logits(self._output(), h).float(), t

    def new_cache(self, rows: int) -> Cache:
        """An empty cache for `rows` texts of up to n_ctx positions."""
        return Cache(rows, self.config)

    @torch.no_grad()
    def read(self, ids: Tensor, cache: Cache, first: int = 0) -> Tensor:
        """Last hidden states (B, T, D) of ids (B, T), which continue the cache's rows from `first`
        on: one position of each (T = 1), or several where the rows are of one length.

        The cache takes them in. Raises UsageError beyond n_ctx positions.
        """
        rows, t = ids.shape
        hidden = self.wpe(self.wte(ids), cache.begin(first, rows, t, ids.device))
        for block, past in zip(self.h, cache.layers, strict=True):
            hidden = block(hidden, past)
        cache.advance(t)
        return hidden

    @torch.no_grad()
    def scores(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of what follows the positions of hidden (..., D) that `read` gave."""
        return self.classes.head_logits(self._output(), self.ln_f(hidden))

    def _hidden(self, x: Tensor) -> Tensor:
        hidden = self.wpe(self.wte(x))  # (B, T) -> (B, T, D)
        keep = not (self.recompute_every and self.training and torch.is_grad_enabled())
        for index, block in enumerate(self.h):
            if keep or index % self.recompute_every:
                hidden = block(hidden)
            else:
                hidden = checkpoint(block, hidden, use_reentrant=False)
        return self.ln_f(hidden)

    def _output(self) -> nn.Module:
        """The module that holds the output matrix."""
        return self.wte if self.head is None else self.head
