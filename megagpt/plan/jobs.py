"""Training jobs as columns of numbers: what the cost model reads (L0: numpy, no torch).

A job is one step of one model on one layout. The columns are those of benchmarks/planner's
published measurements, so that one function predicts what others measured, what a run file asks
for, and every layout of a search. Empty cells are filled by rules that stand here, never by a
measured outcome.
"""

import csv
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megagpt.errors import UsageError
from megagpt.plan.accelerators import ACCELERATORS, Accelerator, accelerator_in

Column = NDArray[np.float64]

FRAMEWORKS = {
    "megatron-deepspeed zero-3": "deepspeed-zero3", "deepspeed zero-3": "deepspeed-2021",
    "sagemaker": "deepspeed-zero3", "megatron-deepspeed": "megatron-deepspeed",
    "neox": "gpt-neox", "metaseq": "megatron-lm", "nemo-megatron": "megatron-lm",
    "megatron-lm": "megatron-lm", "megatron-core": "megatron-core", "mcore": "megatron-core",
    "nemo": "megatron-core", "megatron": "megatron-lm", "pax": "pax", "nanotron": "nanotron",
    "llm-foundry": "fsdp", "torchtitan": "fsdp", "composer": "fsdp", "fsdp": "fsdp",
    "megagpt-eager": "megagpt-eager", "megagpt": "megagpt", "llm.c": "ddp", "ddp": "ddp",
}  # fmt: skip
"""Part of a system's name -> generation of frameworks; the first that is found counts."""

SYSTEMS = tuple(dict.fromkeys(FRAMEWORKS.values()))
EAGER = "-eager"
"""End of the name of a system whose blocks are not compiled; else it is like the one without."""
GENERATIONS = ("V100", "A100", "H100", "B200")

_STAGES = {"fsdp": 3.0, "deepspeed-zero3": 3.0, "deepspeed-2021": 3.0, "megatron-core": 1.0}
"""ZeRO's stage of systems where nobody says; others: 0."""
_OLD = ("megatron-lm", "megatron-deepspeed", "gpt-neox", "deepspeed-2021", "deepspeed-zero3")
"""Systems that had no fused attention in the years of most of their measurements."""
_FLAG = {
    "n": r"^n|false|^0(\.0)?$|^off|without|disable", "y": r"^y|true|^[1-9]|^on|with|flash|fa\d?$"
}  # fmt: skip
WORDS = {
    "recompute": {
        "none": "^$|^no|^n$|false|^0$|^off|disable", "selective": "select|attn|attention|core",
        "full": "full|block|uniform|all|^y|true|^1$",
    },
    "precision": {
        "fp8": "fp8|float8", "fp16": "fp16|(?<!b)float16|half|^16",
        "bf16": "^$|bf16|bfloat16|amp|mixed", "tf32": "tf32", "fp32": "fp32|float32",
    },
    **dict.fromkeys(("flash_attention", "sequence_parallel", "gated_mlp", "untied_output"), _FLAG),
    "flops_convention": {
        "hw_full": "^hw_full", "hw_8PT": "^hw_8pt", "model_6PT": "^model_6pt", "model": "^$|^model",
    },
}  # fmt: skip
"""Column -> what is meant -> how its cells say so; the first counts."""

# Column -> what an empty cell means.
_DEFAULTS = {
    "n_layers": None, "d_model": None, "n_heads": None, "seq_len": None, "global_batch_seqs": None,
    "vocab": 51_200.0, "tp": 1.0, "pp": 1.0, "gpus_per_node": 8.0,
}  # fmt: skip

_SAME = {
    "layers": "n_layers", "width": "d_model", "heads": "n_heads", "seq": "seq_len",
    "keys": "seq_len", "vocab": "vocab", "gpus": "n_gpus", "tp": "tp", "pp": "pp",
    "batch": "global_batch_seqs", "per_node": "gpus_per_node",
}  # fmt: skip
"""Field of Jobs -> the column that it is."""


@dataclass(frozen=True, slots=True)
class Jobs:
    """Columns of equal length, float64 where nothing else is said."""

    layers: Column
    first: Column
    """Layers of the first stage, which bears the embedding."""
    most: Column
    """Layers of the fullest stage."""
    last: Column
    """Layers of the last stage, which bears the logits."""
    width: Column
    heads: Column
    kv_heads: Column
    d_ff: Column
    seq: Column
    keys: Column
    """Keys that a query sees on average over the layers, causal masks not deducted."""
    vocab: Column
    gated: Column
    untied: Column
    gpus: Column
    tp: Column
    pp: Column
    vpp: Column
    """Virtual stages of each pipeline rank (interleaved schedule)."""
    dp: Column
    zero: Column
    micro: Column
    """Sequences of a micro-batch."""
    batch: Column
    """Sequences of a step."""
    sequence_parallel: Column
    full: Column
    """1 where every layer is computed again, a share where only some are."""
    selective: Column
    flash: Column
    fp8: Column
    grad_bytes: Column
    """Bytes of a gradient in the data-parallel reduction."""
    kept_grad_bytes: Column
    """Bytes of a gradient that is added up."""
    weight_bytes: Column
    """2, or 4 in fp32."""
    logits: Column
    """Logits that a rank holds at once."""
    buckets: Column
    """Bytes of buffers that the framework's configuration asks for."""
    offload: Column
    """1 where optimizer states lie in the host's memory."""
    offload_weights: Column
    """1 where the weights do, under ZeRO-3."""
    peak: Column
    """FLOP/s of 16-bit matrix products."""
    processors: Column
    """Multiprocessors of the device."""
    hbm: Column
    """Bytes/s of the device's memory."""
    memory: Column
    """Bytes of the device's memory."""
    nvlink: Column
    """Bytes/s and direction between two devices of a node."""
    node: Column
    """Bytes/s of a node's network."""
    per_node: Column
    """Devices that share a node's network."""
    domain: Column
    """Devices that NVLink connects."""
    gpu: NDArray[np.int64]
    """Generation of the device: index into GENERATIONS."""
    framework: NDArray[np.int64]
    """Index into SYSTEMS."""
    unknown: Column
    """1 where nobody knows the system's name, and it is taken for what does the same."""

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def micro_batches(self) -> Column:
        """Micro-batches of a data rank in a step."""
        return np.maximum(1.0, np.ceil(self.batch / (self.dp * self.micro) - 1e-9))


def jobs_in(rows: Sequence[Mapping[str, Any]]) -> Jobs:
    """Jobs of rows that hold a number for each of their fields; one that is not there is 0."""
    index = ("gpu", "framework")
    columns: dict[str, Any] = {
        name: np.array([row.get(name, 0) for row in rows], "i8" if name in index else "f8")
        for name in Jobs.__dataclass_fields__
    }
    return Jobs(**columns)


def jobs_from_rows(rows: Sequence[Mapping[str, str]], origin: str = "rows") -> Jobs:
    """Jobs of a CSV's rows. Raises UsageError for a cell that is no number or must be there."""
    return jobs_in(
        [_filled(row, f"{origin}, row {row.get('row_id') or n}") for n, row in enumerate(rows)]
    )


def read_rows(path: str | Path) -> list[dict[str, str]]:
    """Rows of a CSV file. Raises UsageError for one that cannot be read or lacks a column."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            rows = [{k: _cell(v or "") for k, v in row.items() if k} for row in table]
    except (OSError, UnicodeDecodeError, csv.Error, AttributeError) as error:
        raise UsageError(f"{path}: cannot be read as CSV: {error}") from None
    needed = ["row_id", *(name for name, default in _DEFAULTS.items() if default is None)]
    missing = [name for name in needed if not rows or name not in rows[0]]
    if missing:
        raise UsageError(f"{path}: needs rows with the columns {', '.join(missing)}")
    return rows


def _cell(text: str) -> str:
    """A cell's text; empty where it only says that there is none."""
    return "" if text.strip().lower() in ("-", "?", "n/a", "na", "nan", "null") else text.strip()


def meant(row: Mapping[str, str], column: str) -> str:
    """What a cell of WORDS means; "" where it is no word of them."""
    text = row.get(column, "").lower()
    return next((name for name, part in WORDS[column].items() if re.search(part, text)), "")


def _yes(row: Mapping[str, str], column: str, empty: bool = False) -> float:
    """1 for a cell that says yes, or is empty where that means so."""
    return float(meant(row, column) == "y" or (empty and not row.get(column)))


def _number(row: Mapping[str, str], name: str, default: float | None, where: str) -> float:
    """A cell, or the default where it is empty. Raises UsageError for one that is no number."""
    text = row.get(name, "")
    plain = text.replace(",", "")
    try:
        value = float(plain) if plain else default
    except ValueError:
        value = None
    if value is None or not np.isfinite(value) or value < 0:
        raise UsageError(f"{where}: {name} = {text!r}: must be a number, 0 or more")
    return value


def _filled(row: Mapping[str, str], where: str) -> dict[str, Any]:
    """One row as the fields of Jobs."""

    def least(name: str, default: float | None) -> float:
        value = _number(row, name, default, where)
        if value <= 0 and name != "zero_stage":
            raise UsageError(f"{where}: {name} = {row.get(name)}: must be above 0")
        return value

    base = {name: least(name, default) for name, default in _DEFAULTS.items()}
    tp, pp = base["tp"], base["pp"]
    base["n_gpus"] = least("n_gpus", tp * pp * least("dp", 1.0))
    dp = least("dp", max(1.0, base["n_gpus"] // (tp * pp)))
    gpu = accelerator_in(row.get("gpu_type", "")) or "a100"
    device = ACCELERATORS[gpu]
    system = row.get("system", "")
    known = float(any(part in _plain(system) for part in FRAMEWORKS))
    framework = framework_of(system, least("zero_stage", 0.0), tp * pp, gpu)
    zero = least("zero_stage", _STAGES.get(framework, 0.0) * known)
    precision = _precision(row, device)
    # ZeRO-3 reduces gradients in 16 bits everywhere but here.
    short = precision == "fp16" or framework in ("fsdp", "ddp", "pax")
    short = short or (zero == 3 and not framework.startswith("megagpt"))
    share = max(1.0, base["global_batch_seqs"] / dp)
    micro = min(share, least("micro_batch", _micro(share, base["seq_len"], pp)))
    recompute = meant(row, "recompute")
    peak = {"fp32": device.fp32_tflops / device.tflops, "tf32": 0.5}.get(precision, 1.0)
    sheet = device_columns(device, _number(row, "internode_gbps_per_node", 0.0, where))
    return {
        **{field: base[column] for field, column in _SAME.items()},
        **dict(zip(("first", "most", "last"), even_stages(base["n_layers"], pp), strict=True)),
        "kv_heads": least("n_kv_heads", base["n_heads"]),
        "d_ff": least("d_ff", 4 * base["d_model"]),
        "vpp": least("virtual_pp", _virtual(framework, base["n_layers"] / pp, pp)),
        "dp": dp,
        "zero": zero,
        "micro": micro,
        "gated": _yes(row, "gated_mlp"),
        "untied": _yes(row, "untied_output"),
        "sequence_parallel": _yes(row, "sequence_parallel"),
        "full": float(recompute == "full"),
        "selective": float(recompute == "selective"),
        "flash": _yes(row, "flash_attention", framework not in _OLD),
        "fp8": float(precision == "fp8"),
        "grad_bytes": 2.0 if short else 4.0,
        "kept_grad_bytes": _kept_grad_bytes(framework, precision),
        "weight_bytes": 4.0 if precision in ("fp32", "tf32") else 2.0,
        "logits": micro * base["seq_len"] * base["vocab"] / tp,
        **(sheet | {"peak": sheet["peak"] * peak}),
        "domain": max(base["gpus_per_node"], device.domain),
        "framework": SYSTEMS.index(framework),
        "unknown": 1 - known,
    }


def _precision(row: Mapping[str, str], device: Accelerator) -> str:
    """The precision of products; V100 has no bf16, and only Hopper and later have fp8."""
    precision = meant(row, "precision") or "bf16"
    if precision == "fp8" and device.generation in ("V100", "A100"):
        precision = "bf16"
    return "fp16" if precision == "bf16" and device.generation == "V100" else precision


def device_columns(device: Accelerator, node_gb: float) -> dict[str, Any]:
    """The columns of a device; a network of 0 is one that nobody named."""
    return {
        "peak": device.reach * device.tflops * 1e12,
        "processors": device.processors,
        "hbm": device.memory_tb_s * 1e12,
        "memory": device.memory_gb * 1e9,
        "nvlink": device.link_gb_s * 1e9,
        "node": (node_gb or device.node_gb) * 1e9 / 8,
        "gpu": GENERATIONS.index(device.generation),
    }


def even_stages(layers: float, pp: float) -> tuple[float, float, float]:
    """Layers of the first, the fullest and the last stage where they are dealt out evenly; where
    embedding and logits make the division whole they count as a layer each (BLOOM's 70)."""
    if pp > 1 and layers % pp != 0 and (layers + 2) % pp == 0:
        most = (layers + 2) / pp
        return most - 1, most, most - 1
    return math.ceil(layers / pp), math.ceil(layers / pp), layers // pp


def _kept_grad_bytes(framework: str, precision: str) -> float:
    """fp16 adds up in place; bf16 in fp32, and DeepSpeed's bf16 optimizer keeps both."""
    return 2.0 if precision == "fp16" else 6.0 if framework == "megatron-deepspeed" else 4.0


def _virtual(framework: str, layers: float, pp: float) -> float:
    """Virtual stages where nobody says: NVIDIA's later recipes give each a layer or two."""
    return max(1.0, layers // 2) if framework == "megatron-core" and pp > 1 else 1.0


def _micro(share: float, seq: float, pp: float) -> float:
    """A micro-batch where nobody says: the largest part of a rank's share of 16k tokens (4k with
    a pipeline, whose bubble wants many)."""
    most = max(1, int((4096 if pp > 1 else 16_384) // seq))
    return float(max(n for n in range(1, most + 1) if n == 1 or share % n == 0))


def _plain(system: str) -> str:
    """A system's name with ZeRO's stage written one way."""
    return re.sub(r"zero[ -]*(stage[ -]*)?3", "zero-3", system.lower())


def framework_of(system: str, zero: float, model_parallel: float, gpu: str) -> str:
    """Generation of frameworks by the system's name; for an unknown one by what it does."""
    low = _plain(system)
    # On older devices NeMo was timed with the Megatron-LM of their years alone.
    core = "megatron-core" if ACCELERATORS[gpu].generation in ("H100", "B200") else "megatron-lm"
    for part, generation in FRAMEWORKS.items():
        if part in low:
            return core if generation == "megatron-core" else generation
    if zero == 3 and "deepspeed" in low:
        return "deepspeed-zero3"
    return core if model_parallel > 1 and zero < 3 else "fsdp"
