"""What computes a run on this device, decided in one place and said once (L2).

1) `environment`: what torch, Inductor, cuBLAS and NCCL read when they are first used;
2) `choose`: kernels and compiler, from the device, the run file and the installed packages;
3) `apply`: torch's process-wide switches that go with the choice, and one line in the log.

"Bit for bit the same" needs parallel.deterministic on CUDA: the backward passes of cuDNN's and of
FlashAttention 2's kernel add up dQ by atomics. Under torch.use_deterministic_algorithms
scaled_dot_product_attention leaves cuDNN out and FlashAttention sums dQ in order; flex_attention,
the loss and AdamW are deterministic in themselves.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megagpt.cluster.ranks import cores
from megagpt.config import RunConfig
from megagpt.config.presets import ModelConfig
from megagpt.engine.compiler import missing_compiler
from megagpt.model.kernels import attention as kernels
from megagpt.model.kernels.attention import FLEX_WIDTH, attention_form
from megagpt.model.kernels.loss import loss_form
from megagpt.plan.layout import Layout, padded_model

log = logging.getLogger(__name__)

ALIGNMENT = 8
"""Rows of the output matrix come in multiples of this, or cuBLAS falls back to kernels that load
two bytes at a time: less than half the speed in bf16."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What computes the run on this rank; run.json keeps it."""

    device: str
    """The device's name, with its type in front."""
    attention: Mapping[str, str]
    """dense, banded -> the kernel, for the kinds of layers that the model has."""
    loss: str
    """The form of the loss (see megagpt.model.kernels.loss)."""
    compile: str
    """no, blocks (each block by itself, one compilation for all of a kind) or model."""
    deterministic: bool
    """Whether only kernels run that give the same bits every time (a CPU has no others)."""
    output_rows: int
    """Rows of the output matrix on this rank, padding among them."""
    slow: tuple[str, ...] = ()
    """What costs more than a tenth of the speed, each with its reason."""


def environment(config: RunConfig, cuda: bool, local_world: int) -> dict[str, str]:
    """Variables to set before torch is used, where they are not set already.

    `cuda`: whether the run is on a CUDA device; `local_world`: ranks on this host.
    """
    found = {}
    if cuda or config.parallel.compile is True:
        # Inductor starts as many processes in every rank as the host has cores.
        found["TORCHINDUCTOR_COMPILE_THREADS"] = str(max(1, min(32, cores() // local_world)))
    else:
        # Spares the import of the compiler, which takes longer than a small run's first steps.
        # Never on CUDA: flex_attention without Dynamo writes out T x T scores.
        found["TORCHDYNAMO_DISABLE"] = "1"
    if config.parallel.deterministic:
        found |= {
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # one workspace for each stream
            "NCCL_ALGO": "Ring",  # else it is chosen by size and by what was measured at the start
            "TORCHINDUCTOR_DETERMINISTIC": "1",  # no tuning by the clock
        }
    return found


def choose(config: RunConfig, layout: Layout, device: torch.device, stage: int = 0) -> Choices:
    """The choice for a run on `device`, under ZeRO stage `stage`."""
    kind, model = device.type, config.model
    dtype = DTYPES[config.parallel.dtype]
    slow = []
    if kind == "cpu" and dtype == torch.bfloat16 and not kernels.BF16_PRODUCTS:
        slow.append(
            'this CPU does not multiply bf16; parallel.dtype = "fp32" is many times as fast'
        )
    # A band as wide as the context is dense attention.
    forms: dict[str, str] = {
        layer: attention_form(
            kind,
            dtype,
            layer == "banded" and model.band_width < model.n_ctx,
            model.dropout,
            model.d_head,
        )
        for layer in ("dense", "banded")
        if layer in model.attention
    }
    if kind == "cuda" and forms.get("banded") == "blocks":
        slow.append(f"banded attention without flex_attention ({_without_flex(model)})")
    for layer, form in forms.items():
        if form == "sdpa":
            forms[layer] = f"sdpa {_sdpa_backend(config, device, dtype)}"
            if kind == "cuda" and forms[layer].endswith("math"):
                slow.append(f"{layer} attention without a fused kernel")
    loss = loss_form(kind, dtype, shared=layout.tensor > 1)
    if kind == "cuda" and loss != "triton":
        slow.append(f"the loss in several passes over the logits ({loss})")
    rows = padded_model(config, layout).head_rows // layout.tensor
    if kind == "cuda" and rows % ALIGNMENT:
        slow.append(f"{rows} rows of the output matrix, no multiple of {ALIGNMENT}")
    compiled = _compile_mode(config, kind, stage, slow)
    return Choices(
        device=f"{kind} ({torch.cuda.get_device_name(device)})" if kind == "cuda" else kind,
        attention=forms,
        loss=loss,
        compile=compiled,
        deterministic=config.parallel.deterministic,
        output_rows=rows,
        slow=tuple(slow),
    )


def _without_flex(model: ModelConfig) -> str:
    """Why flex_attention does not take a band."""
    if model.dropout:
        return "it has no dropout"
    if model.d_head < FLEX_WIDTH:
        return f"heads are {model.d_head} wide, it takes {FLEX_WIDTH} and more"
    return f"this host has not {missing_compiler('cuda')}"


def _compile_mode(config: RunConfig, kind: str, stage: int, slow: list[str]) -> str:
    """no, blocks or model; adds to `slow` where the compiler that is wanted is not there."""
    wanted = config.parallel.compile
    if wanted is False or (wanted == "auto" and kind != "cuda"):
        return "no"
    if stage == 3:
        slow.append(
            "nothing is compiled: ZeRO-3's hooks would cut each block into many graphs, and what "
            "they count would have them compiled again in every step"
        )
        return "no"
    lacking = missing_compiler(kind)
    if lacking:
        slow.append(
            f"parallel.compile = {str(wanted).lower()}, but this host has not {lacking} that "
            "torch.compile needs; going on without compiling"
        )
        return "no"
    # Block by block: one compilation serves every layer of a kind, and hooks on a layer still run.
    # As one graph a small model saves 4% on a CPU (docs/benchmarks/model_step.md).
    return "model" if kind == "cpu" else "blocks"


def _sdpa_backend(config: RunConfig, device: torch.device, dtype: torch.dtype) -> str:
    """Which kernel scaled_dot_product_attention takes: flash, cudnn, efficient or math."""
    from torch.nn.attention import SDPBackend

    model = config.model
    q = torch.empty(1, 1, model.n_ctx, model.d_head, dtype=dtype, device=device, requires_grad=True)
    # Asked in the run's own mode, which is set later: it leaves cuDNN out.
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(before or config.parallel.deterministic)
    try:
        chosen = torch._fused_sdp_choice(q, q, q, dropout_p=model.dropout, is_causal=True)
    finally:
        torch.use_deterministic_algorithms(before)
    return SDPBackend(chosen).name.removesuffix("_ATTENTION").lower()


def apply(choices: Choices, first: bool) -> None:
    """Sets torch's switches for this process, before a model is built; the `first` rank says what
    was chosen."""
    # Partial sums of a product stay fp32 where cuBLAS splits it.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if choices.deterministic:
        torch.use_deterministic_algorithms(True)
        # A debugger's help, which would fill every new tensor with NaN.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if not first:
        return
    attention = ", ".join(f"{layer} {form}" for layer, form in choices.attention.items())
    log.info(
        "%s: attention %s; loss %s; compile %s; deterministic %s; %d output rows",
        choices.device,
        attention,
        choices.loss,
        choices.compile,
        "yes" if choices.deterministic else "no",
        choices.output_rows,
    )
    for reason in choices.slow:
        log.warning("slow: %s", reason)
