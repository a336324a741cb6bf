"""results.jsonl as Markdown; what was not measured stays empty, predictions stand beside it."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks import roofline
from benchmarks.gpu_check.items import (
    GATES,
    MICRO_BATCHES,
    MODES,
    STEPS,
    TRAININGS,
    Step,
    Training,
)
from megagpt.config.presets import PRESETS, ModelConfig

Results = Sequence[dict[str, Any]]
DRY = (
    "Dry run on a CPU: every model is tiny, whatever its row is called. It says that each item "
    "works, and nothing about speed."
)


def render(results: Results) -> str:
    """All tables."""
    parts = [calls(results), probe(results), exactness(results), steps(results), trainings(results)]
    # Else names and predictions of the presets would be taken for those of what was run.
    head = [DRY] if of(results, "call", device="cpu") else []
    return "\n\n".join([*head, *parts, failures(results)]).strip()


def lines(head: str, rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; None is an empty cell."""
    columns = head.split("|")
    text = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in rows:
        text.append(f"| {' | '.join('' if cell is None else str(cell) for cell in row)} |")
    return "\n".join(text)


def of(results: Results, kind: str, **facts: object) -> list[dict[str, Any]]:
    """The records of a kind, in order."""
    return [r for r in results if r["kind"] == kind and facts.items() <= r.items()]


def last(results: Results, kind: str, **facts: object) -> dict[str, Any]:
    """The last such record; empty where there is none."""
    return (of(results, kind, **facts) or [{}])[-1]


def percent(value: float | None) -> str | None:
    return None if value is None else f"{value:.1%}"


def giga(value: float | None) -> str | None:
    return f"{value / 1e9:.1f}" if value else None


def number(value: float | None, form: str = ",.0f", factor: float = 1.0) -> str | None:
    return None if value is None else format(value * factor, form)


def calls(results: Results) -> str:
    """What was measured, when, on what."""
    rows = [
        (r["time"], r["commit"], r["card"], ", ".join(f"{k} {v}" for k, v in r["versions"].items()))
        for r in of(results, "call")
    ]
    return lines("measured|commit|card|versions", rows or [(None,) * 4])


def probe(results: Results) -> str:
    """Questions and answers."""
    rows = [(r["question"], f"`{json.dumps(r['answer'])}`") for r in of(results, "probe")]
    return lines("probe|answer", rows or [(None, None)])


def exactness(results: Results) -> str:
    """The gates, with and without parallel.deterministic."""

    def verdict(mode: str, gate: str) -> str | None:
        found = last(results, "exact", mode=mode, gate=gate)
        if not found:
            return None
        if found["first_different_step"] is None and found["weights_equal"]:
            return f"bit for bit, {found['steps']} steps"
        step, most = found["first_different_step"], found["largest_loss_difference"]
        return f"differs from step {step}, loss by up to {most:.1e}"

    return lines(
        f"gate|{'|'.join(MODES)}",
        [(gate, *(verdict(mode, gate) for mode in MODES)) for gate in GATES],
    )


def card(results: Results) -> roofline.Card:
    """The card that predictions are for: the measured one, or an H100."""
    name = last(results, "call").get("card", "")
    return next((c for key, c in roofline.CARDS.items() if key in name), roofline.CARDS["H100"])


def steps(results: Results) -> str:
    """Model steps: the preset's micro-batch, and the best of those that fit."""
    rows = []
    for row in STEPS:
        found = of(results, "step", name=row.name)
        fits = [r for r in found if "step_s" in r]
        own = next((r for r in fits if r["micro_batch"] == row.micro_batch), {})
        best = max(fits, key=lambda r: r["tokens_per_s"], default={})
        rows.append(
            (
                row.size,
                row.attention,
                row.contender,
                row.micro_batch,
                percent(predicted_step(row, card(results))),
                percent(own.get("mfu")),
                number(own.get("step_s"), ".1f", 1e3),
                giga(own.get("peak_bytes")),
                max((r["micro_batch"] for r in fits), default=None),
                best.get("micro_batch"),
                percent(best.get("mfu")),
                number(best.get("tokens_per_s")),
                giga(best.get("peak_bytes")),
            )
        )
    head = "model step|attention|who|sequences|predicted MFU|MFU|ms|peak GB|most that fit"
    return lines(f"{head}|best|its MFU|tokens/s|peak GB", rows)


def predicted_step(row: Step, card: roofline.Card) -> float | None:
    """MFU of one micro-batch and its optimizer step; None for others' models."""
    contender, _, compiled = row.contender.partition("+")
    if contender != "ours":
        return None
    config = dataclasses.replace(preset(row.size), attention=tuple(row.attention.split(",")))
    forms = dataclasses.replace(roofline.AFTER, compiled=bool(compiled))
    return roofline.predict(config, row.micro_batch, forms, card).mfu


def preset(size: str) -> ModelConfig:
    return PRESETS[f"gpt3-{size}"].model


def trainings(results: Results) -> str:
    """Trainings end to end."""
    rows = []
    for row in TRAININGS:
        r = last(results, "train", name=row.name)
        # Forward, backward, optimizer: the rest is waiting, agreeing and logging.
        split = [number(r.get(f"{k}_s"), ".0f", 1e3) for k in ("forward", "backward", "optimizer")]
        rows.append(
            (
                row.name,
                row.micro_batch,
                percent(predicted_training(row, card(results))),
                percent(r.get("mfu")),
                number(r.get("tokens_per_s")),
                number(r.get("step_s"), ".0f", 1e3),
                " / ".join(s or "" for s in split) if r else None,
                giga(r.get("peak_bytes")),
                number(r.get("first_step_s"), ".1f"),
                f"{r['first_loss']:.2f} to {r['last_loss']:.2f}" if "last_loss" in r else None,
                computing(r.get("computing")),
            )
        )
    head = "training|sequences|predicted MFU|MFU|tokens/s|step ms|forward / backward / optimizer"
    return lines(f"{head}|peak GB|first step s|loss|computed by", rows)


def computing(chosen: dict[str, Any] | None) -> str | None:
    """What run.json says of kernels and compiler, and what it warns of."""
    if not chosen:
        return None
    kernels = [f"{layer} {form}" for layer, form in chosen["attention"].items()]
    words = [*kernels, f"loss {chosen['loss']}", f"compile {chosen['compile']}"]
    return ", ".join([*words, *(f"slow: {reason}" for reason in chosen["slow"])])


def predicted_training(row: Training, card: roofline.Card) -> float | None:
    """MFU of MICRO_BATCHES micro-batches a step; None for what the roofline does not know."""
    known = {"zero2", "zero3", "fp16", "recompute", "eager"}
    suffix = row.name.removeprefix(row.size).removeprefix("-")
    if suffix and suffix not in known:
        return None
    # Under ZeRO-3 nothing is compiled: its hooks would cut each block into many graphs.
    compiled = suffix not in ("eager", "zero3")
    forms = dataclasses.replace(roofline.AFTER, compiled=compiled, recompute=suffix == "recompute")
    return roofline.predict(preset(row.size), row.micro_batch, forms, card, MICRO_BATCHES).mfu


def failures(results: Results) -> str:
    """Items that did not end well, once each."""
    ends = {r["item"]: r for r in of(results, "item")}
    words = {None: "not started: no time left", "limit": "ended at its limit"}
    rows = [
        (name, words.get(r["code"], f"exit code {r['code']}"), number(r["s"], ".0f"))
        for name, r in ends.items()
        if r["code"] != 0
    ]
    return lines("item|not whole|s", rows) if rows else ""
