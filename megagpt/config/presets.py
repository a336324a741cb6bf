"""What each model of the papers is: shape and recipe, as literal rows (L0).

A row holds the numbers that the paper prints, so that anyone can check it against the paper;
tests hold each row against the paper's parameter counts. Sources: Brown et al. 2020 (GPT-3,
Table 2.1 and Appendix B), Radford et al. 2019 (GPT-2), Radford et al. 2018 (GPT-1), Chen et al.
2020 (Image GPT).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Interval, MinLen

from megagpt.config.bounds import Size, around

Attention = Literal["dense", "banded"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The shape of one model: all that decides its parameters and its function."""

    family: Literal["gpt2", "gpt1", "igpt"] = "gpt2"
    """gpt2 (GPT-2 and GPT-3), gpt1 or igpt."""
    n_layer: Annotated[int, Interval(ge=1, le=10_000)]
    """Transformer blocks."""
    n_head: Size
    """Attention heads of each block; divides d_model."""
    d_model: Size
    """Width of the residual stream."""
    n_ctx: Size
    """Context, in tokens: the longest sequence the learned positions reach."""
    vocab_size: Size = 50257
    """Tokens of the vocabulary, without padding."""
    vocab_multiple: Size = 1
    """The embedding is padded to a multiple of this; padding is never scored nor sampled."""
    attention: Annotated[tuple[Attention, ...], MinLen(1)] = ("dense",)
    """Attention of each layer, a pattern of "dense" and "banded" repeated over the layers."""
    band_width: Size = 256
    """Keys that a banded query sees, itself included."""
    activation: Literal["gelu_tanh", "gelu"] = "gelu_tanh"
    """Inside the MLP: GELU's tanh approximation, as in GPT-1 to 3, or GELU itself, as in nanoGPT.
    Image GPT has one of its own and takes neither."""
    dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Probability of dropping an element of embeddings, attention weights and residual branches."""
    classes: Annotated[int, Interval(ge=0, le=2**31 - 1)] = 0
    """Classes that a linear head tells apart from the state at the extract token, the last id of
    the vocabulary, as in GPT-1's fine-tuning; 1: which of `parts` is right; 0: no such head."""
    parts: Size = 1
    """With classes: sequences of a sample, each n_ctx / parts tokens long and read by itself."""
    lm_weight: Annotated[float, Ge(0)] = 0.5
    """With classes: weight of the next-token loss beside that of the head."""

    @property
    def positions(self) -> int:
        """Learned positions: the longest sequence that is read at once."""
        return self.n_ctx // self.parts

    @property
    def d_head(self) -> int:
        """Width of a head."""
        return self.d_model // self.n_head

    @property
    def d_ff(self) -> int:
        """Width inside the MLP: four times d_model in every family."""
        return 4 * self.d_model

    @property
    def has_bias(self) -> bool:
        """Whether linear layers and norms have biases; Image GPT's have none."""
        return self.family != "igpt"

    @property
    def tied(self) -> bool:
        """Whether the output matrix is the embedding; Image GPT has one of its own."""
        return self.family != "igpt"

    @property
    def start_token(self) -> int | None:
        """The id whose embedding is Image GPT's learned start vector: first input, never a target.

        It stands after the vocabulary, so that a palette's colours keep their numbers.
        """
        return self.vocab_size if self.family == "igpt" else None

    @property
    def n_embedding(self) -> int:
        """Embeddings that mean something: the vocabulary, and the start vector if there is one."""
        return self.vocab_size + (self.start_token is not None)

    @property
    def embedding_rows(self) -> int:
        """Rows of wte: n_embedding, padded to a multiple of vocab_multiple."""
        return -(-self.n_embedding // self.vocab_multiple) * self.vocab_multiple

    @property
    def head_rows(self) -> int:
        """Rows of the output matrix with padding: wte's own where the two are tied."""
        if self.tied:
            return self.embedding_rows
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    def band(self, index: int) -> int | None:
        """Keys that a query of layer `index` sees at most, or None where the layer is dense."""
        kind = self.attention[index % len(self.attention)]
        return None if kind == "dense" else self.band_width

    def problems(self) -> Iterator[str]:
        """What makes this shape impossible."""
        if self.d_model % self.n_head:
            yield (
                f"model.d_model = {self.d_model}: must be a multiple of n_head ({self.n_head}), so "
                "that every head has the same width"
            )
        yield from self._head_problems()

    def _head_problems(self) -> Iterator[str]:
        if self.parts > 1 and not self.classes:
            yield f"model.parts = {self.parts}: must be 1 without model.classes; set that too"
        if self.classes == 1 and self.parts == 1:
            yield "model.classes = 1: must be 2 or more, or model.parts what is chosen among"
        if self.n_ctx % self.parts:
            yield (
                f"model.n_ctx = {self.n_ctx}: must be a multiple of model.parts ({self.parts}); "
                f"use {around(self.n_ctx, self.parts)}"
            )
        if self.classes and self.family == "igpt":
            yield (
                f"model.classes = {self.classes}: must be 0 in family igpt, whose last id is a "
                "colour and no extract token"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """A row: the model, and the paper's recipe in the keys of a run file."""

    model: ModelConfig
    schedule: dict[str, float]
    """Defaults of [schedule]; everything in tokens."""
    optimizer: dict[str, object]
    """Defaults of [optimizer]."""


def _gpt3(n_layer: int, d_model: int, n_head: int, batch: int, peak_lr: float, ramp: int) -> Preset:
    """A row of GPT-3's Table 2.1; `ramp` (tokens) is our choice within the paper's 4-12 billion."""
    return Preset(
        model=ModelConfig(
            n_layer=n_layer,
            d_model=d_model,
            n_head=n_head,
            n_ctx=2048,
            attention=("dense", "banded"),
        ),
        schedule={
            "total_tokens": 300_000_000_000,
            "warmup_tokens": 375_000_000,
            "decay_tokens": 260_000_000_000,
            "peak_lr": peak_lr,
            "min_lr_ratio": 0.1,
            "batch_tokens": batch,
            "ramp_start_tokens": 32_768,
            "ramp_tokens": ramp,
        },
        optimizer={},
    )


def _gpt2(n_layer: int, d_model: int, n_head: int, peak_lr: float) -> Preset:
    """A row of GPT-2's Table 2.

    The paper prints the batch (512 sequences) and no other number of its recipe. Ours: GPT-3's
    schedule and learning rates by size. Dropout is GPT-1's, which the paper does not revise; for
    a single pass over much text set model.dropout = 0.
    """
    return Preset(
        model=ModelConfig(n_layer=n_layer, d_model=d_model, n_head=n_head, n_ctx=1024, dropout=0.1),
        schedule={
            "total_tokens": 300_000_000_000,
            "warmup_tokens": 375_000_000,
            "decay_tokens": 260_000_000_000,
            "peak_lr": peak_lr,
            "min_lr_ratio": 0.1,
            "batch_tokens": 524_288,
        },
        optimizer={},
    )


def _gpt1() -> Preset:
    """GPT-1 (section 4.1): 100 epochs of BooksCorpus in batches of 64 sequences of 512 tokens.

    The corpus has about 985 million words and the paper gives no number of tokens: 100 epochs are
    taken as 100 billion. Warm-up is 2,000 updates. Betas are Adam's defaults, and the gradient is
    clipped to 1 as in OpenAI's code; the paper is silent on both.
    """
    return Preset(
        model=ModelConfig(
            family="gpt1",
            n_layer=12,
            d_model=768,
            n_head=12,
            n_ctx=512,
            vocab_size=40_478,
            dropout=0.1,
        ),
        schedule={
            "total_tokens": 100_000_000_000,
            "warmup_tokens": 2_000 * 32_768,
            "decay_tokens": 100_000_000_000,
            "peak_lr": 2.5e-4,
            "min_lr_ratio": 0.0,
            "batch_tokens": 32_768,
        },
        optimizer={"betas": (0.9, 0.999), "weight_decay": 0.01, "gradient_clipping": 1.0},
    )


def _igpt(
    n_layer: int, d_model: int, n_head: int, peak_lr: float, images: int, pixels: int
) -> Preset:
    """A row of Image GPT: `pixels` of a 512-colour palette an image, `images` a batch.

    Every size sees 128 million images. Warm-up is one epoch: ImageNet's 1,281,167 training images
    without the 4% that the paper holds out. Its gradient is clipped to 1 by our default, of which
    the paper says nothing.
    """
    total = 128_000_000 * pixels
    return Preset(
        model=ModelConfig(
            family="igpt",
            n_layer=n_layer,
            d_model=d_model,
            n_head=n_head,
            n_ctx=pixels,
            vocab_size=512,
        ),
        schedule={
            "total_tokens": total,
            "warmup_tokens": 1_229_920 * pixels,
            "decay_tokens": total,
            "peak_lr": peak_lr,
            "min_lr_ratio": 0.0,
            "batch_tokens": images * pixels,
        },
        optimizer={"weight_decay": 0.0},
    )


# fmt: off
PRESETS: dict[str, Preset] = {
    #                     layers  d_model  heads    batch  peak LR     ramp tokens
    "gpt3-125m":  _gpt3(     12,     768,    12,   524_288, 6.0e-4,  4_000_000_000),
    "gpt3-350m":  _gpt3(     24,    1024,    16,   524_288, 3.0e-4,  4_000_000_000),
    "gpt3-760m":  _gpt3(     24,    1536,    16,   524_288, 2.5e-4,  4_000_000_000),
    # The paper prints 24 heads of 128, which is not 2048: 16 heads of 128.
    "gpt3-1.3b":  _gpt3(     24,    2048,    16, 1_048_576, 2.0e-4,  6_000_000_000),
    "gpt3-2.7b":  _gpt3(     32,    2560,    32, 1_048_576, 1.6e-4,  6_000_000_000),
    "gpt3-6.7b":  _gpt3(     32,    4096,    32, 2_097_152, 1.2e-4,  8_000_000_000),
    # The paper prints d_model 5140; Table D.1's 12,850M parameters and 40 heads of 128 prove 5120.
    "gpt3-13b":   _gpt3(     40,    5120,    40, 2_097_152, 1.0e-4, 10_000_000_000),
    # The paper prints a batch of 3.2M tokens, which is no multiple of 2,048: 1,536 sequences.
    "gpt3-175b":  _gpt3(     96,   12288,    96, 3_145_728, 0.6e-4, 12_000_000_000),
    #                     layers  d_model  heads  peak LR
    "gpt2-124m":  _gpt2(     12,     768,    12,   6.0e-4),
    "gpt2-355m":  _gpt2(     24,    1024,    16,   3.0e-4),
    "gpt2-774m":  _gpt2(     36,    1280,    20,   2.5e-4),
    "gpt2-1.5b":  _gpt2(     48,    1600,    25,   2.0e-4),
    "gpt1":       _gpt1(),
    #                     layers  d_model  heads  peak LR  images  pixels
    # Only iGPT-S's learning rate (0.003) is at hand; larger models get smaller ones of ours.
    "igpt-s":     _igpt(     24,     512,     8,   3.0e-3,    128,   1024),
    "igpt-m":     _igpt(     36,    1024,     8,   3.0e-3,    128,   1024),
    "igpt-l":     _igpt(     48,    1536,    16,   1.0e-3,    128,   1024),
    # Trained at 64 x 64. The paper's text names no heads: 16, as common reproductions have.
    "igpt-xl":    _igpt(     60,    3072,    16,   3.0e-4,     64,   4096),
}
# fmt: on
