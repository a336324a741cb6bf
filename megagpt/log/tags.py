"""Where a figure of metrics.jsonl stands in TensorBoard (L1, stdlib only).

The last part of a tag is the name in metrics.jsonl; the part before it is the group under which
TensorBoard folds it. Names that are not listed here go to the group "more", so a new figure of
the trainer shows up without a change of this file.

TensorBoard sorts groups by their names, figures within them, and opens the first ones. Losses are
to be seen first: `train` and `validation` hold them and nothing else. Groups of other figures begin
with x_ (what says how a step was made with w_), those with a chart for every layer with y_.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

_GROUPS = {
    "train": "loss perplexity",
    "update": "lr batch_tokens grad_norm update_norm param_norm update_ratio",
    "validation": "validation_loss validation_perplexity validation_bits_per_byte",
    "speed": "tokens_per_s mfu hfu tflops_per_rank",
    "time": "step_s data_s forward_s backward_s communication_s optimizer_s details_s "
    "checkpoint_stall_s evaluate_s",
    "memory": "memory_allocated_bytes memory_reserved_bytes memory_peak_bytes host_memory_bytes",
    "precision": "loss_scale skipped_steps",
    "noise": "noise_scale_tokens gradient_square noise_trace",
    "progress": "step samples",
}
_GROUP = {name: group for group, names in _GROUPS.items() for name in names.split()}
_FOLDED = {"validation_losses": "validation"}
"""Groups of records in records whose own name says less than the group's."""
_UNFOLDED = {group: name for name, group in _FOLDED.items()}
_WHOLE = frozenset("step samples batch_tokens skipped_steps tokens".split())
"""Figures that are whole numbers."""
_PERPLEXITIES = {
    "loss": "train/perplexity",
    "validation_loss": "validation/validation_perplexity",
}
AXIS = "tokens"
_MARKS = {"train": "", "validation": "", "update": "w_", "norms": "y_", "activations": "y_"}
"""Group -> the mark that puts it in its place; of all others x_."""


def tags(record: Mapping[str, Any]) -> dict[str, float]:
    """TensorBoard's tag and value of each number in a record (of Python's own types).

    Records in records keep their path. Text, lists and the axis itself are left out.
    """
    values: dict[str, float] = {}
    for path, value in _numbers(record):
        group, slash, rest = path.partition("/")
        if slash:
            values[placed(f"{_FOLDED.get(group, group)}/{rest}")] = value
        elif path not in (AXIS, "time"):
            values[placed(f"{_GROUP.get(path, 'more')}/{path}")] = value
    return values


def placed(tag: str) -> str:
    """The tag with the mark of where its group stands."""
    return _MARKS.get(tag.partition("/")[0], "x_") + tag


def _numbers(record: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, float]]:
    """The path of each number in a record, and the number."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{above}{name}/")
        elif isinstance(value, int | float):
            yield above + name, float(value)


def record_of(values: Mapping[str, float]) -> dict[str, Any]:
    """The record of which tags() makes these values, as far as they tell it.

    Whole numbers that a float32 may have rounded are left out, and so is what derived() makes.
    """
    record: dict[str, Any] = {}
    for tag, value in values.items():
        group, _, name = tag.partition("/")
        # Older events have no marks, and the update's figures in the group of the loss.
        group = group[2:] if group.startswith(("w_", "x_", "y_")) else group
        group = "update" if group == "train" and _GROUP.get(name) == "update" else group
        figure: float | int = value
        if name.rpartition("/")[2] in _WHOLE:
            if abs(value) >= 2**24:
                continue
            figure = int(value)
        if tag in _PERPLEXITIES.values():
            continue
        if group == _GROUP.get(name, "more"):
            record[name] = figure
        elif group in _UNFOLDED:
            record.setdefault(_UNFOLDED[group], {})[name] = figure
        elif "/" in name:
            middle, _, last = name.rpartition("/")
            record.setdefault(group, {}).setdefault(middle, {})[last] = figure
        else:
            record.setdefault(group, {})[name] = figure
    return record


def derived(record: Mapping[str, Any]) -> dict[str, float]:
    """Figures that follow from the record's losses (nats per token): perplexity is exp(loss)."""
    # Beyond 80 a float32, TensorBoard's number, would be infinite; min() would lose a NaN.
    return {
        tag: math.exp(80.0 if record[name] > 80.0 else record[name])
        for name, tag in _PERPLEXITIES.items()
        if name in record
    }
