"""First minute: the card's ceilings, and each assumption that this code makes of CUDA.

    python -m benchmarks.gpu_check.probe

One question after another, each answer recorded; one that raises is recorded too and stops none.

Letters: B batch, T sequence, H heads, E width of a head, N positions, D width, V vocabulary.
"""

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from benchmarks.gpu_check.results import FILE, first_line, record, seconds_left
from megagpt.model.kernels.attention import attend, make_block_mask
from megagpt.model.kernels.loss import cross_entropy

DEVICE = os.environ.get("DEVICE", "cuda")
CUDA = DEVICE == "cuda"
HEADS = {64: 12, 80: 32, 96: 16, 128: 16} if CUDA else {64: 2, 80: 2, 96: 2, 128: 2}
"""E -> H of a preset."""
BAND = 256 if CUDA else 16
QUESTIONS: dict[str, Callable[[], object]] = {}


def question(text: str) -> Callable[[Callable[[], object]], Callable[[], object]]:
    """Adds a function that answers."""

    def add(answer: Callable[[], object]) -> Callable[[], object]:
        QUESTIONS[text] = answer
        return answer

    return add


def seconds(run: Callable[[], object], times: int = 10) -> float:
    """Mean time of a call after two to warm up."""
    run(), run()
    wait()
    t0 = time.perf_counter()
    for _ in range(times if CUDA else 1):
        run()
    wait()
    return (time.perf_counter() - t0) / (times if CUDA else 1)


def wait() -> None:
    """Until the device is done."""
    if CUDA:
        torch.cuda.synchronize()


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Normal numbers."""
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def draw_qkv(e: int, heads: int) -> list[Tensor]:
    """q, k, v (B, H, T, E) with the strides of the model's: views of one (B, T, 3, H, E)."""
    b, t = (8, 2048) if CUDA else (1, 2 * BAND)
    return [x.transpose(1, 2).requires_grad_() for x in draw(b, t, 3, heads, e).unbind(2)]


# --- ceilings -------------------------------------------------------------------------------------


@question("bf16 product of 8,192 cubed, TFLOP/s")
def product() -> float:
    n = 8192 if CUDA else 128
    a, b = draw(n, n), draw(n, n)
    return round(2 * n**3 / seconds(lambda: a @ b) / 1e12, 1)


@question("copy, TB/s read and written")
def copy() -> float:
    a = draw(1 << (29 if CUDA else 16), dtype=torch.float32)
    b = torch.empty_like(a)
    return round(2 * a.nbytes / seconds(lambda: b.copy_(a)) / 1e12, 3)


@question("head products by rows, TFLOP/s: logits, hidden gradient, weight gradient")
def head_products() -> dict[int, list[float]]:
    n, d = (16384, 768) if CUDA else (64, 32)
    found = {}
    for rows in (50257, 50264, 50304) if CUDA else (257, 264, 384):
        hidden, weight, out = draw(n, d), draw(rows, d), draw(n, rows)
        forms = (
            lambda h=hidden, w=weight, o=out: torch.mm(h, w.t(), out=o),
            lambda w=weight, o=out: o @ w,
            lambda h=hidden, o=out: o.t() @ h,
        )
        found[rows] = [round(2 * n * rows * d / seconds(f) / 1e12, 1) for f in forms]
    return found


@question("host to device, microseconds for a micro-batch of 16 x 2,048 ids: pageable, pinned")
def to_device() -> list[float]:
    ids = torch.zeros(16, 2048, dtype=torch.int64)
    pinned = ids.pin_memory() if CUDA else ids
    forms = (lambda: ids.to(DEVICE), lambda: pinned.to(DEVICE, non_blocking=True))
    return [round(seconds(f) * 1e6, 1) for f in forms]


@question("device to host, GB/s: pageable, pinned")
def to_host() -> list[float]:
    a = draw(1 << (27 if CUDA else 12), dtype=torch.float32)
    kept = torch.empty(a.shape, pin_memory=CUDA)
    forms = (lambda: a.to("cpu", copy=True), lambda: kept.copy_(a))
    return [round(a.nbytes / seconds(f, 3) / 1e9, 1) for f in forms]


# --- loss -----------------------------------------------------------------------------------------


def loss_inputs(n: int, d: int, vocab: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (N, D), output matrix with padding and targets, a few not scored."""
    hidden, weight = draw(n, d).requires_grad_(), (draw(rows, d) / d**0.5).requires_grad_()
    targets = torch.randint(0, vocab, (n,), device=DEVICE)
    targets[:3] = -1
    return hidden, weight, targets


@question("loss against float64, relative error of loss and gradients: eager, compiled")
def loss_right() -> dict[str, list[float]]:
    vocab, rows = (50257, 50304) if CUDA else (500, 512)
    hidden, weight, targets = loss_inputs(512, 64, vocab, rows)
    exact_inputs = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logits = exact_inputs[0] @ exact_inputs[1][:vocab].t()
    expected = F.cross_entropy(logits, targets, ignore_index=-1)
    gradients = torch.autograd.grad(expected, exact_inputs)
    # Inductor takes minutes on a busy CPU, which is not what is asked about.
    compiled = torch.compile(cross_entropy, backend="inductor" if CUDA else "aot_eager")
    found = {}
    for name, form in (("eager", cross_entropy), ("compiled", compiled)):
        loss = form(hidden, weight, targets, vocab)
        ours = torch.autograd.grad(loss, (hidden, weight))
        errors = [abs(loss.double() / expected - 1)]
        errors += [(a.double() - b).norm() / b.norm() for a, b in zip(ours, gradients, strict=True)]
        found[name] = [float(f"{float(e):.1e}") for e in errors]
    return found


@question("loss of 125m with 16 sequences, ms")
def loss_speed() -> float:
    n, d, vocab, rows = (32768, 768, 50257, 50304) if CUDA else (64, 32, 257, 384)
    hidden, weight, targets = loss_inputs(n, d, vocab, rows)
    return round(
        seconds(lambda: cross_entropy(hidden, weight, targets, vocab).backward(), 3) * 1e3, 2
    )


# --- attention ------------------------------------------------------------------------------------


@cache
def mask_of(band: int | None, t: int) -> object:
    """The block mask that the model gives a band on CUDA, whose kernel is flex_attention then."""
    return make_block_mask(t, band, torch.device(DEVICE)) if CUDA and band else None


def attention_speed(band: int | None) -> dict[int, dict[str, object]]:
    """ms forward and with the backward pass, TFLOP/s of both, peak memory, by width of head."""
    found: dict[int, dict[str, object]] = {}
    for e, heads in HEADS.items():
        q, k, v = draw_qkv(e, heads)
        mask, direction = mask_of(band, q.shape[2]), torch.randn_like(q)
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()

        def forward(q=q, k=k, v=v, mask=mask) -> Tensor:
            return attend(q, k, v, band, mask=mask)

        def both(q=q, k=k, v=v, forward=forward, direction=direction) -> None:
            torch.autograd.grad(forward(), (q, k, v), direction)

        forward_s = seconds(forward)
        both_s = seconds(both)
        keys = (q.shape[2] + 1) / 2 if band is None else band
        flops = 4.0 * q.numel() * keys
        found[e] = {
            "ms": [round(1e3 * forward_s, 2), round(1e3 * both_s, 2)],
            "tflops": [round(flops / forward_s / 1e12), round(3 * flops / both_s / 1e12)],
        }
        if CUDA:
            found[e]["peak_GB"] = round((torch.cuda.max_memory_allocated() - before) / 1e9, 2)
    return found


@question("dense attention by width of head")
def dense() -> object:
    return attention_speed(None)


@question("banded attention by width of head")
def banded() -> object:
    return attention_speed(BAND)


@question("kernel that scaled_dot_product_attention takes, by width of head")
def kernel() -> dict[int, str]:
    found = {}
    for e, heads in HEADS.items():
        q, k, v = draw_qkv(e, heads)
        found[e] = SDPBackend(torch._fused_sdp_choice(q, k, v, is_causal=True)).name
    return found


@question("banded attention by width of head, Dynamo disabled")
def without_dynamo() -> object:
    return elsewhere(banded, TORCHDYNAMO_DISABLE="1")


def elsewhere(answer: Callable[[], object], **variables: str) -> object:
    """The same answer from a process with other variables, which torch reads only once."""
    text = next(text for text, known in QUESTIONS.items() if known is answer)
    env = {k: v for k, v in os.environ.items() if k != FILE} | variables
    line = [sys.executable, "-m", "benchmarks.gpu_check.probe", text]
    limit = min(60 if CUDA else 300, seconds_left())
    done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=limit)
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-200:])
    return json.loads(done.stdout)["answer"]


# --- the same twice -------------------------------------------------------------------------------


@question("backward passes bit-equal in 6 runs")
def same_twice() -> dict[str, bool]:
    torch.use_deterministic_algorithms("CUBLAS_WORKSPACE_CONFIG" in os.environ)
    n, d, rows = (32768, 768, 50304) if CUDA else (128, 32, 384)
    q, k, v = draw_qkv(64, HEADS[64])
    hidden, weight, targets = loss_inputs(n, d, rows - 7, rows)
    ids, mask = targets.clamp(min=0), mask_of(BAND, q.shape[2])
    forms: dict[str, tuple[Callable[[], Tensor], list[Tensor]]] = {
        "dense": (lambda: attend(q, k, v).float().sum(), [q, k, v]),
        "banded": (lambda: attend(q, k, v, BAND, mask=mask).float().sum(), [q, k, v]),
        "embedding": (lambda: F.embedding(ids, weight).float().square().sum(), [weight]),
        "loss": (lambda: cross_entropy(hidden, weight, targets, rows - 7), [hidden, weight]),
    }
    found = {}
    for name, (run, inputs) in forms.items():
        seen = [torch.autograd.grad(run(), inputs) for _ in range(6)]
        found[name] = all(
            torch.equal(a, b) for one in seen for a, b in zip(one, seen[0], strict=True)
        )
    return found


@question("backward passes bit-equal in 6 runs, use_deterministic_algorithms")
def same_twice_deterministic() -> object:
    return elsewhere(same_twice, CUBLAS_WORKSPACE_CONFIG=":4096:8")


def main(names: list[str]) -> int:
    """Answers all questions, or those named."""
    warnings.simplefilter("ignore")
    torch.manual_seed(1)
    failed = 0
    for text, answer in QUESTIONS.items():
        if names and text not in names:
            continue
        t0 = time.perf_counter()
        try:
            found = answer()
        except Exception as error:  # whatever it is, it is an answer
            found, failed = first_line(error), failed + 1
        record("probe", question=text, answer=found, s=round(time.perf_counter() - t0, 1))
    return 1 if failed else 0


if __name__ == "__main__":
    # The driver names the item.
    sys.exit(main([name for name in sys.argv[1:] if name != "probe"]))
