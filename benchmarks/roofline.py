"""Predicted step time and MFU on one GPU, kernel by kernel.

    python benchmarks/roofline.py                            # the table of docs/benchmarks/gpu.md
    python benchmarks/roofline.py --kernels 125m             # where a micro-batch's time goes
    python benchmarks/roofline.py --card H200

Every kernel of a micro-batch and of an optimizer step is listed with its FLOPs and the bytes that
it moves to and from memory; its time is the longest of FLOPs / rate, bytes / bandwidth and FLOOR_S
a launch. The time of a step is that of all its kernels, or of the host that launches them where
that is longer. Nothing here was measured with this code: rates are a card's by published figures
and by plain products and copies, so a prediction is good to a fifth of itself (docs/benchmarks/
gpu.md sets measured values beside it).

Letters: N tokens of a micro-batch, D width, L layers, R rows of the embedding, E width of a head,
P parameters, u = 2 N D bytes, one activation of the residual stream in bf16.
"""

import argparse
import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

from megagpt.config.flops import flops_per_token, parameters, visible_keys
from megagpt.config.presets import PRESETS, ModelConfig
from megagpt.plan.accelerators import peak_tflops

FLOOR_S = 2.5e-6
"""Shortest kernel."""
FORWARD_LAUNCH_S, BACKWARD_LAUNCH_S = 7e-6, 5e-6
"""Host time of one launch, from Python and from autograd."""
ENGINE_HOST_S, STEP_HOST_S = 1.5e-3, 6e-3
"""Host time of DeepSpeed's hooks a micro-batch; of records, agreement and logs a step."""
TILE = 128, 256
"""Rows and columns of a matrix product that one multiprocessor computes at a time."""
UNFUSED_FLOPS = 60e12
"""Rate of the fp32 products of an attention that is written out."""


@dataclasses.dataclass(frozen=True)
class Card:
    """What one GPU reaches: products and attention in FLOP/s, memory in bytes/s."""

    name: str
    product: float
    """Large aligned bf16 products."""
    misaligned: float
    """Products with an odd leading dimension: no 16-byte loads, no tensor memory accelerator."""
    stream: float
    """Elementwise kernels, bytes read and written."""
    processors: int
    dense: dict[int, tuple[float, float]]
    """By width of head: causal attention's forward and backward rate at a context of 2,048."""
    banded: dict[int, tuple[float, float]]
    """The same of flex_attention, in FLOPs of the blocks that it visits."""

    @property
    def peak(self) -> float:
        """Dense bf16 peak, FLOP/s."""
        found = peak_tflops(self.name)
        assert found, self.name
        return found * 1e12


_HOPPER_DENSE = {64: (420e12, 300e12), 80: (400e12, 280e12), 96: (430e12, 300e12)}
_HOPPER_DENSE[128] = (520e12, 400e12)
_HOPPER_BANDED = {64: (300e12, 180e12), 80: (200e12, 120e12), 96: (220e12, 130e12)}
_HOPPER_BANDED[128] = (320e12, 190e12)
_AMPERE_DENSE = {64: (170e12, 120e12), 80: (150e12, 105e12), 96: (165e12, 120e12)}
_AMPERE_DENSE[128] = (190e12, 140e12)
_AMPERE_BANDED = {e: (0.6 * f, 0.55 * b) for e, (f, b) in _AMPERE_DENSE.items()}
CARDS = {
    # 798 and 788 TFLOP/s of an 8,192-cubed product and copies of 3.0 and 4.3 TB/s were seen on
    # random data; kernels of a model reach nine tenths of a copy.
    "H100": Card(
        "NVIDIA H100 80GB HBM3", 760e12, 220e12, 2.7e12, 132, _HOPPER_DENSE, _HOPPER_BANDED
    ),
    "H200": Card("NVIDIA H200", 760e12, 220e12, 3.9e12, 132, _HOPPER_DENSE, _HOPPER_BANDED),
    # The 80 GB SXM form; no product was timed.
    "A100": Card(
        "NVIDIA A100-SXM4-80GB", 265e12, 130e12, 1.7e12, 108, _AMPERE_DENSE, _AMPERE_BANDED
    ),
}


@dataclasses.dataclass(frozen=True)
class Forms:
    """How the model is computed; the defaults are this code's on a GPU."""

    band_fused: bool = True
    """Banded attention as one kernel, or with its T x T scores written out in fp32."""
    vocab_multiple: int = 128
    """Rows of the embedding are padded to a multiple of this."""
    loss_fused: bool = True
    """Logits normalised by one kernel in chunks of 2^29, or by nine passes in chunks of 2^26."""
    compiled: bool = True
    """Each block's elementwise operators fused."""
    immediate: bool = True
    """Gradients go to their fp32 sum as each is ready: 18 instead of 26 bytes a parameter."""
    recompute: bool = False
    """Every block computed again in the backward pass."""


AFTER = Forms()
BEFORE = Forms(
    band_fused=False, vocab_multiple=1, loss_fused=False, compiled=False, immediate=False
)
"""The code before its GPU path was mended."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel, or several of a kind."""

    phase: str
    """forward, backward, engine (a micro-batch's sum of gradients) or step (the optimizer's)."""
    kind: str
    flops: float
    """Of the mathematics: what megagpt.config.flops counts (padding of the vocabulary aside)."""
    bytes: float
    calls: int
    seconds: float

    @property
    def host_s(self) -> float:
        """Time that the host needs to launch them."""
        return self.calls * (FORWARD_LAUNCH_S if self.phase == "forward" else BACKWARD_LAUNCH_S)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One optimizer step of a rank."""

    kernels: tuple[Kernel, ...]
    accumulation: int
    """Micro-batches of the step."""
    step_s: float
    micro_batch_s: float
    """Of its kernels alone."""
    mfu: float


def predict(
    config: ModelConfig,
    micro_batch: int,
    forms: Forms = AFTER,
    card: Card = CARDS["H100"],
    accumulation: int = 1,
) -> Prediction:
    """A step of `accumulation` micro-batches of `micro_batch` sequences, ZeRO-1 on one rank."""
    config = dataclasses.replace(config, vocab_multiple=forms.vocab_multiple)
    listed = tuple(kernels(config, micro_batch, forms, card))
    device, host = {True: 0.0, False: 0.0}, {True: STEP_HOST_S, False: ENGINE_HOST_S}
    for kernel in listed:
        device[kernel.phase == "step"] += kernel.seconds
        host[kernel.phase == "step"] += kernel.host_s
    step_s = accumulation * max(device[False], host[False]) + max(device[True], host[True])
    flops = flops_per_token(config) * micro_batch * config.n_ctx * accumulation
    return Prediction(listed, accumulation, step_s, device[False], flops / step_s / card.peak)


# --- kernels --------------------------------------------------------------------------------------


def kernels(config: ModelConfig, micro_batch: int, forms: Forms, card: Card) -> Iterator[Kernel]:
    """Every kernel of a micro-batch, then of the optimizer's step."""
    n, d = micro_batch * config.n_ctx, config.d_model
    unit = 2.0 * n * d
    yield streamed(card, "forward", "embedding", 5 * unit, 2)
    for index in range(config.n_layer):
        forward = list(block_forward(config, index, n, forms, card))
        yield from forward
        if forms.recompute:
            for k in forward:
                yield dataclasses.replace(k, phase="backward", kind="recomputation", flops=0.0)
        yield from block_backward(config, index, n, forms, card)
    yield streamed(card, "forward", "norms", 2 * unit, 1)
    yield streamed(card, "backward", "norms", 5 * unit, 2)
    yield from head(config, n, forms, card)
    # The embedding's gradient is scattered into zeros and added to the head's.
    rows = 2.0 * config.embedding_rows * d
    yield streamed(card, "backward", "embedding", 2 * unit + 4 * rows, 5)
    yield from engine(config, forms, card)


def block_forward(
    config: ModelConfig, index: int, n: int, forms: Forms, card: Card
) -> Iterator[Kernel]:
    """One block's forward pass."""
    d, unit = config.d_model, 2.0 * n * config.d_model
    for d_in, d_out in matrices(config):
        yield product(card, "forward", "products of blocks", (n, d_out, d_in))
    yield attention(config, index, n, forms, card, "forward")
    yield streamed(card, "forward", "GELU", 2 * unit * config.d_ff / d, 1)
    if forms.compiled:
        # The first residual sum and the second norm are one kernel.
        yield streamed(card, "forward", "norms", 2 * unit, 1)
        yield streamed(card, "forward", "residual sums", 7 * unit, 2)
    else:
        yield streamed(card, "forward", "norms", 4 * unit, 2)
        yield streamed(card, "forward", "residual sums", 6 * unit, 2)


def block_backward(
    config: ModelConfig, index: int, n: int, forms: Forms, card: Card
) -> Iterator[Kernel]:
    """One block's backward pass."""
    d, unit = config.d_model, 2.0 * n * config.d_model
    for d_in, d_out in matrices(config):
        yield product(card, "backward", "products of blocks", (n, d_in, d_out))
        yield product(card, "backward", "products of blocks", (d_out, d_in, n))
    yield attention(config, index, n, forms, card, "backward")
    yield streamed(card, "backward", "GELU", 3 * unit * config.d_ff / d, 1)
    # dq, dk and dv become the gradient of one (N, 3 D).
    yield streamed(card, "backward", "copies", 6 * unit, 1)
    if config.has_bias:
        yield streamed(card, "backward", "bias gradients", (5 + config.d_ff / d) * unit, 4)
    # A norm reads its input and gradient for dx, and both again for its gain and bias.
    if forms.compiled:
        yield streamed(card, "backward", "norms", 2 * 6 * unit, 4)
    else:
        yield streamed(card, "backward", "norms", 2 * 5 * unit, 4)
        yield streamed(card, "backward", "residual sums", 6 * unit, 2)


def matrices(config: ModelConfig) -> Sequence[tuple[int, int]]:
    """(d_in, d_out) of a block's linear layers."""
    d, wide = config.d_model, config.d_ff
    return (d, 3 * d), (d, d), (d, wide), (wide, d)


def head(config: ModelConfig, n: int, forms: Forms, card: Card) -> Iterator[Kernel]:
    """Logits, loss and both gradients, chunk by chunk (megagpt.model.kernels.loss)."""
    d, rows = config.d_model, config.embedding_rows
    chunks = math.ceil(n * rows / (1 << (29 if forms.loss_fused else 26)))
    part = math.ceil(n / chunks)
    useful = config.vocab_size / rows
    for phase, shape in (
        ("forward", (part, rows, d)),
        ("forward", (part, d, rows)),
        ("forward", (rows, d, part)),
    ):
        one = product(card, phase, "products of the head", shape, aligned=rows % 8 == 0)
        yield dataclasses.replace(
            one,
            flops=2.0 * n * rows * d * useful,
            calls=chunks,
            seconds=chunks * one.seconds,
            bytes=chunks * one.bytes,
        )
    # Fused: two reads and a write of bf16. Otherwise to fp32 (6), maximum (4), difference (8),
    # exponential (8), sum (4), quotient (8) and back (6); what touches one logit a row is free.
    passes, count = (6.0, 1) if forms.loss_fused else (44.0, 12)
    yield streamed(card, "forward", "loss", passes * n * rows, count * chunks)
    wide = 12.0 if forms.loss_fused else 10.0
    yield streamed(card, "forward", "sum of head gradient", wide * rows * d * (chunks - 1), chunks)
    yield streamed(card, "backward", "sum of head gradient", 14.0 * rows * d + 4.0 * n * d, 3)


def attention(
    config: ModelConfig, index: int, n: int, forms: Forms, card: Card, phase: str
) -> Kernel:
    """One layer's attention; FLOPs are those of the keys that a query sees."""
    d, t, back = config.d_model, config.n_ctx, phase == "backward"
    passes = 2.0 if back else 1.0
    flops = passes * 4.0 * n * d * visible_keys(config, index, "halved")
    band = config.band(index)
    width = min(card.dense, key=lambda e: (e < config.d_head, abs(e - config.d_head)))
    calls = 3 if back else 1
    if band is None or band >= t:
        kind, seconds = "attention, dense", flops / card.dense[width][back]
    elif forms.band_fused:
        # Blocks of 128 queries visit whole blocks of 128 keys.
        keys = 128 * math.ceil((band - 1) / 128) + 128
        seconds = passes * 4.0 * n * d * keys / card.banded[width][back]
        kind = "attention, banded"
    else:
        scores = 4.0 * n * t * config.n_head
        moved, calls = scores * (16 if back else 9), 25 if back else 14
        whole = passes * 4.0 * n * d * t * 3 / UNFUSED_FLOPS
        return Kernel(phase, "attention, unfused", flops, moved, calls, moved / card.stream + whole)
    return Kernel(phase, kind, flops, 8 * passes * n * d, calls, max(seconds, calls * FLOOR_S))


def engine(config: ModelConfig, forms: Forms, card: Card) -> Iterator[Kernel]:
    """What is done with gradients and weights; one call for each tensor, fewer in the optimizer."""
    p, tensors = float(parameters(config)), 12 * config.n_layer + 4
    moved, calls = (18 * p, 2 * tensors) if forms.immediate else (26 * p, 3 * tensors)
    yield streamed(card, "engine", "fp32 sum of gradients", moved, calls)
    yield streamed(card, "step", "norm and clipping", 12 * p, 3 * tensors)
    yield streamed(card, "step", "AdamW", 28 * p, 4)
    yield streamed(card, "step", "bf16 copy of weights, zeros", 10 * p, 6)


def product(
    card: Card, phase: str, kind: str, shape: tuple[int, int, int], aligned: bool = True
) -> Kernel:
    """(m, k) times (k, n) in bf16, for shape (m, n, k)."""
    m, n, k = shape
    flops, moved = 2.0 * m * n * k, 2.0 * (m * k + k * n + m * n)
    rate = card.misaligned
    if aligned:
        waves = math.ceil(m / TILE[0]) * math.ceil(n / TILE[1]) / card.processors
        # The last wave leaves processors idle; kernels that split the rest evenly hide a part.
        full = 0.93 if waves >= 4 else 0.3 + 0.7 * waves / math.ceil(waves)
        # Filling and draining the pipeline costs about 256 of k.
        rate = card.product * k / (k + 256) * full
    return Kernel(phase, kind, flops, moved, 1, max(flops / rate, moved / card.stream, FLOOR_S))


def streamed(card: Card, phase: str, kind: str, moved: float, calls: int) -> Kernel:
    """Kernels without products, which memory limits."""
    return Kernel(phase, kind, 0.0, moved, calls, max(moved / card.stream, calls * FLOOR_S))


# --- tables ---------------------------------------------------------------------------------------

SIZES = {"125m": 16, "350m": 16, "760m": 8, "1.3b": 8}
"""Size -> sequences of a micro-batch."""


def predict_size(
    size: str, forms: Forms = AFTER, card: Card = CARDS["H100"], micro_batch: int = 0
) -> Prediction:
    """A GPT-3 preset at its own batch on one rank; `micro_batch` 0: that of SIZES."""
    preset, sequences = PRESETS[f"gpt3-{size}"], micro_batch or SIZES[size]
    batch = int(preset.schedule["batch_tokens"])
    accumulation = batch // (sequences * preset.model.n_ctx)
    return predict(preset.model, sequences, forms, card, accumulation)


CHANGES: tuple[tuple[str, Forms], ...] = (
    ("before", BEFORE),
    ("banded attention fused", dataclasses.replace(BEFORE, band_fused=True)),
    (
        "vocabulary padded",
        dataclasses.replace(BEFORE, band_fused=True, vocab_multiple=128),
    ),
    ("loss fused", dataclasses.replace(AFTER, compiled=False, immediate=False)),
    ("gradients summed at once", dataclasses.replace(AFTER, compiled=False)),
    ("blocks compiled: after", AFTER),
)
"""One change after another."""


def table(card: Card) -> str:
    """Predicted MFU of the four sizes, change by change, in Markdown."""
    heads = [f"{size}, {sequences} sequences" for size, sequences in SIZES.items()]
    lines = [f"| {card.name} | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name, forms in CHANGES:
        cells = [f"{predict_size(size, forms, card).mfu:.0%}" for size in SIZES]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def kernel_table(prediction: Prediction, card: Card) -> str:
    """Time of a micro-batch by kind of kernel, the longest first, in Markdown.

    `lost` is time beyond what the kind's FLOPs, attention counted as causal, take at the peak.
    """
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0] * 4)
    for k in prediction.kernels:
        if k.phase != "step":
            row = (k.seconds, k.calls, k.bytes, k.flops)
            sums[k.kind] = [a + b for a, b in zip(sums[k.kind], row, strict=True)]
    lines = ["| kernels | ms | lost, ms | calls | GB | TFLOP |", "|---|---|---|---|---|---|"]
    for kind, (seconds, calls, moved, flops) in sorted(sums.items(), key=lambda kv: -kv[1][0]):
        lost = seconds - flops / card.peak
        lines.append(
            f"| {kind} | {seconds * 1e3:.2f} | {lost * 1e3:.2f} | {calls:.0f} | {moved / 1e9:.2f} "
            f"| {flops / 1e12:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Prints the table, or the kernels of one size."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--card", choices=CARDS, default="H100")
    parser.add_argument("--kernels", choices=SIZES, help="list this size's kernels by kind")
    parser.add_argument("--before", action="store_true", help="kernels of the code before")
    parser.add_argument("--micro-batch", type=int, default=0, help="sequences; 0: the table's")
    options = parser.parse_args()
    card = CARDS[options.card]
    if not options.kernels:
        print(table(card))
        return
    forms = BEFORE if options.before else AFTER
    found = predict_size(options.kernels, forms, card, options.micro_batch)
    print(kernel_table(found, card))
    print(
        f"\nmicro-batch {found.micro_batch_s * 1e3:.1f} ms of kernels, step of "
        f"{found.accumulation} micro-batches {found.step_s * 1e3:.0f} ms, MFU {found.mfu:.1%}"
    )


if __name__ == "__main__":
    main()
