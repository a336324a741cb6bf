"""From a file of ds_configs/ to the JSON that DeepSpeed is given (L0, stdlib only).

A file says how DeepSpeed carries a run and holds "auto" wherever the run file decides. One table
below says what each "auto" becomes. The rules: only "auto" is filled in; a literal that
contradicts the run file is a problem, and so is a key that is missing where DeepSpeed's default
contradicts it; an "auto" that no rule fills is a problem, because DeepSpeed drops it without a
word (runtime/config_utils.py). All problems are returned at once.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megagpt.config import RunConfig
from megagpt.config.flops import parameters
from megagpt.errors import UsageError
from megagpt.files import shipped
from megagpt.plan.layout import (
    Layout,
    accumulation_steps,
    layout_problems,
    micro_batch_of,
    padded_model,
)

FOLDER = shipped("ds_configs")
"""The project's own files."""


def read_ds_config(name: str) -> dict[str, Any]:
    """The JSON of a file of ds_configs/ by its name, or of a file by its path.

    Raises UsageError for a file that is missing or not a JSON object.
    """
    path = Path(name) if name.endswith(".json") else FOLDER / f"{name}.json"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.json")))
        raise UsageError(
            f"parallel.ds_config = {name!r}: {path} does not exist; use a path that ends in .json "
            f"or one of {known}"
        )
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise UsageError(f"{path}: must hold one JSON object, DeepSpeed's configuration")
    return tree


def resolve(config: RunConfig, layout: Layout, tree: dict[str, Any]) -> dict[str, Any]:
    """`tree` with every "auto" replaced by what the run and the layout say.

    Raises UsageError with every problem: of the layout, of a leftover "auto", of a literal that
    contradicts the run file, of a combination that DeepSpeed carries wrongly.
    """
    found = list(_malformed(tree))
    resolved: dict[str, Any] = {}
    if not found:
        found = list(layout_problems(config, layout))
        facts = _facts(config, tree["zero_optimization"]["stage"])
        if found:
            # The batch on a layout that cannot be is not worth another message.
            tree = {key: value for key, value in tree.items() if key not in _BATCH}
        else:
            facts.update(zip(_BATCH, _batch(config, layout), strict=True))
        resolved = _fill(tree, facts, "", found)
        _cap_bucket(config, layout, resolved)
        found += _missing(tree, facts)
        found += _combinations(config, layout, resolved)
    if found:
        lines = "\n".join(f"  - {problem}" for problem in found)
        raise UsageError(f"parallel.ds_config = {config.parallel.ds_config!r}, {layout}:\n{lines}")
    return resolved


def offloads(zero: Mapping[str, Any], what: str) -> str:
    """Where zero_optimization keeps the optimizer's states, or the weights (`what` = optimizer or
    param), off the device: cpu or nvme; "" where it does not, as DeepSpeed's own "none"."""
    section = zero.get(f"offload_{what}")
    place = section.get("device") if isinstance(section, dict) else None
    return "" if place in ("none", None) else str(place)


def _malformed(tree: dict[str, Any]) -> Iterator[str]:
    """What must be mended before the rest can be read."""
    for key in ("zero_optimization", "bf16", "fp16", "data_types"):
        if not isinstance(tree.get(key, {}), dict):
            yield f"{key} = {json.dumps(tree[key])}: must be an object"
    zero = tree.get("zero_optimization", {})
    if not isinstance(zero, dict):
        return
    stage = zero.get("stage")
    if type(stage) is not int or not 0 <= stage <= 3:
        yield f"zero_optimization.stage = {json.dumps(stage)}: must be 0, 1, 2 or 3"
    for key in ("offload_optimizer", "offload_param"):
        if not isinstance(zero.get(key, {}), dict):
            yield f"zero_optimization.{key} = {json.dumps(zero[key])}: must be an object"


def _missing(tree: dict[str, Any], facts: dict[str, Any]) -> Iterator[str]:
    """Keys that the file must have, because DeepSpeed without them would do something else."""
    dtype = next((d for d in ("bf16", "fp16") if facts[f"{d}.enabled"]), "fp32")
    # What DeepSpeed takes where a file is silent.
    defaults = {
        "gradient_clipping": 1.0,
        "bf16.enabled": False,
        "fp16.enabled": False,
        "data_types.grad_accum_dtype": dtype,
        "communication_data_type": dtype,
    }
    for key, fact in facts.items():
        *sections, last = key.split(".")
        section = tree
        for name in sections:
            section = section.get(name, {})
        if last not in section and fact != defaults.get(key):
            yield f'{key} is missing: the run file says {json.dumps(fact)}; add it as "auto"'


_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def _batch(config: RunConfig, layout: Layout) -> tuple[int, int, int]:
    """The values of _BATCH for the first step; Engine.train_step sets those of each step."""
    start = config.schedule.start_tokens
    micro_batch = micro_batch_of(config, layout, start)
    steps = accumulation_steps(config, layout, start)
    # DeepSpeed wants the product, which counts the passes of idle ranks too.
    return micro_batch * steps * layout.data, micro_batch, steps


def _facts(config: RunConfig, stage: int) -> dict[str, Any]:
    """What the run decides on any layout, by DeepSpeed's dotted key."""
    dtype = config.parallel.dtype
    facts: dict[str, Any] = {
        "gradient_clipping": config.optimizer.gradient_clipping,
        "bf16.enabled": dtype == "bf16",
        "fp16.enabled": dtype == "fp16",
    }
    # With hundreds of micro-steps bf16 would lose the small gradients, and so would a reduction
    # in bf16: what was added up in fp32 travels in fp32. Stage 0 carries fp32 alone, where
    # DeepSpeed does both anyway.
    if stage > 0:
        kind = "fp16" if dtype == "fp16" and stage < 2 else "fp32"
        facts["data_types.grad_accum_dtype"] = kind
        facts["communication_data_type"] = kind
    return facts


def _fill(tree: Any, facts: dict[str, Any], where: str, found: list[str]) -> Any:
    """`tree` with its "auto" values filled from `facts`; contradictions are added to `found`."""
    if isinstance(tree, dict):
        return {k: _fill(v, facts, f"{where}.{k}" if where else k, found) for k, v in tree.items()}
    if tree == "auto":
        if where in facts:
            return facts[where]
        found.append(f'{where} = "auto": nothing in the run file decides this; write a value')
    elif where in facts and tree != facts[where]:
        found.append(
            f"{where} = {json.dumps(tree)}: the run file says {json.dumps(facts[where])}; write "
            '"auto" here, or the same value'
        )
    return tree


def _cap_bucket(config: RunConfig, layout: Layout, resolved: dict[str, Any]) -> None:
    """Lowers reduce_bucket_size to the elements of the whole model.

    DeepSpeed allocates the bucket before the first step whatever the model's size: 500 million
    fp32 gradients are 2 GB beside a model of 125M parameters.
    """
    zero = resolved["zero_optimization"]
    size = zero.get("reduce_bucket_size")
    if isinstance(size, int):
        zero["reduce_bucket_size"] = min(size, parameters(padded_model(config, layout)))


def _combinations(config: RunConfig, layout: Layout, tree: dict[str, Any]) -> Iterator[str]:
    """Combinations that DeepSpeed 0.19.8 refuses late or carries wrongly without a word."""
    zero = tree.get("zero_optimization", {})
    stage, dtype = zero["stage"], config.parallel.dtype
    offload = offloads(zero, "optimizer")
    if layout.pipelined and stage != 1:
        yield (
            f"zero_optimization.stage = {stage} with pipeline or tensor parallel: must be 1 "
            "(DeepSpeed's pipeline engine refuses 2 and 3, and clips by a wrong norm at 0); use "
            'parallel.ds_config = "pipeline"'
        )
    if layout.pipelined and offload and dtype != "fp32":
        yield (
            "zero_optimization.offload_optimizer with pipeline or tensor parallel and fp32 "
            "gradient accumulation: DeepSpeed loses the tied embedding's gradient; remove "
            'offload_optimizer, or set parallel.dtype = "fp32"'
        )
    if stage == 0 and dtype != "fp32":
        yield (
            f"zero_optimization.stage = 0 with parallel.dtype = {dtype!r}: DeepSpeed takes an "
            "optimizer step on empty gradients at its start, which spoils Adam's bias correction; "
            'use parallel.ds_config = "zero1" (on one rank it holds the same)'
        )
    if zero.get("round_robin_gradients"):
        yield (
            "zero_optimization.round_robin_gradients = true: it mixes up which part of the "
            "optimizer belongs to which parameter, so checkpoints would be wrong; remove it"
        )
    if "optimizer" in tree or "scheduler" in tree:
        yield "optimizer, scheduler: the run file owns them; remove these sections"
