"""What a person sees while a run goes on: a bar on a terminal, plain lines elsewhere.

The bar stands on stderr and is redrawn a few times a second; messages of logging scroll above
it. Plain lines go through logging.
"""

import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

from megagpt.log.eta import Eta
from megagpt.log.units import amount, duration

KINDS = ("auto", "bar", "plain", "off")
logger = logging.getLogger("megagpt.log")
_BY_WORTH = ("loss", "skipped", "speed", "mfu", "lr", "batch", "grad")
"""Names of a step's figures, the most telling first."""
_BESIDE = 35
"""Characters of the bar's line that are no figures: share, ETA, gaps and the bar itself."""
_REDRAW_S = 0.1


def figures(record: Mapping[str, Any]) -> dict[str, str]:
    """The figures of a step worth a person's glance, by name, each as text with its name."""
    texts = {
        "loss": f"loss {record['loss']:.4f}" if "loss" in record else "",
        "lr": f"lr {record['lr']:.2e}" if "lr" in record else "",
        "batch": f"batch {amount(record['batch_tokens'])}" if "batch_tokens" in record else "",
        "grad": f"grad {record['grad_norm']:.3g}" if record.get("grad_norm") is not None else "",
        "speed": f"{amount(record['tokens_per_s'])} tok/s" if "tokens_per_s" in record else "",
        "mfu": f"mfu {100 * record['mfu']:.1f}%" if "mfu" in record else "",
        "skipped": f"skipped {record['skipped_steps']}" if record.get("skipped_steps") else "",
    }
    return {name: text for name, text in texts.items() if text}


def fitting(texts: Mapping[str, str], width: int) -> str:
    """As many of the figures as fit into `width` characters, the most telling first."""
    kept: set[str] = set()
    for name in _BY_WORTH:
        if name in texts and (len(texts[name]) + 2) <= width:
            width -= len(texts[name]) + 2
            kept.add(name)
    return "  ".join(text for name, text in texts.items() if name in kept)


class Console:
    """Receives every record of the run, and shows nothing: "off"."""

    def step(self, record: Mapping[str, Any]) -> None:
        """A training step is done."""

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """An evaluation is done."""

    def event(self, record: Mapping[str, Any]) -> None:
        """Something else happened."""

    def close(self) -> None:
        """The run ends or stops."""


class Lines(Console):
    """A line of logging every `every_steps` steps, and for each evaluation and event: "plain"."""

    def __init__(self, eta: Eta, every_steps: int) -> None:
        self._eta = eta
        self._every_steps = max(1, every_steps)
        self._first = True

    def step(self, record: Mapping[str, Any]) -> None:
        tokens, total = record["tokens"], self._eta.total_tokens
        due = self._first or record["step"] % self._every_steps == 0 or tokens >= total
        self._first = False
        if due:
            share = 100 * min(1.0, tokens / total)
            texts = [
                f"step {record['step']}",
                f"tokens {amount(tokens)}/{amount(total)} ({share:.1f}%)",
                *figures(record).values(),
                f"eta {duration(self._eta.seconds(tokens))}",
            ]
            logger.info("%s", "  ".join(texts))

    def evaluation(self, record: Mapping[str, Any]) -> None:
        text = f"step {record['step']}  validation loss {record['validation_loss']:.4f}"
        sets = record.get("validation_losses", {})
        if len(sets) > 1:
            text += "  (" + "  ".join(f"{name} {loss:.4f}" for name, loss in sets.items()) + ")"
        logger.info("%s", text)

    def event(self, record: Mapping[str, Any]) -> None:
        known = ("event", "step", "tokens", "time")
        facts = [f"{name} {value}" for name, value in record.items() if name not in known]
        line = [f"step {record.get('step', 0)}  {record['event']}", *facts]
        logger.info("%s", "  ".join(line))


class Bar(Lines):
    """A progress bar in tokens with the last step's figures in it; lines for all else: "bar"."""

    def __init__(self, eta: Eta, done_tokens: int) -> None:
        super().__init__(eta, every_steps=1)
        from rich.console import Console as Terminal
        from rich.progress import BarColumn, Progress, TextColumn

        before = (sys.stderr, sys.stdout)
        self._pending: Mapping[str, Any] | None = None
        self._drawn = 0.0
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None, complete_style="cyan", finished_style="green"),
            TextColumn("{task.percentage:>5.1f}%"),
            TextColumn("{task.fields[figures]}"),
            TextColumn("[dim]eta {task.fields[eta]}"),
            console=Terminal(stderr=True),
            refresh_per_second=4,
            expand=True,
        )
        self._task = self._progress.add_task(
            self._title(done_tokens),
            total=eta.total_tokens,
            completed=done_tokens,
            figures="",
            eta="?",
        )
        self._progress.start()
        self._moved = _move_handlers(before, sys.stderr)

    def _title(self, tokens: int) -> str:
        return f"{amount(tokens)}/{amount(self._eta.total_tokens)} tokens"

    def step(self, record: Mapping[str, Any]) -> None:
        self._pending = record
        # Fast steps need not pay for text that nobody can read.
        if time.monotonic() - self._drawn >= _REDRAW_S:
            self._draw()

    def _draw(self) -> None:
        record, self._pending, self._drawn = self._pending, None, time.monotonic()
        if record is None:
            return
        tokens = record["tokens"]
        title = self._title(tokens)
        self._progress.update(
            self._task,
            completed=min(tokens, self._eta.total_tokens),
            description=title,
            figures=fitting(figures(record), self._progress.console.width - len(title) - _BESIDE),
            eta=duration(self._eta.seconds(tokens)),
        )

    def close(self) -> None:
        self._draw()
        self._progress.stop()
        for handler, stream in self._moved:
            handler.setStream(stream)
        self._moved = []


def _move_handlers(
    before: tuple[Any, ...], stream: Any
) -> list[tuple[logging.StreamHandler[Any], Any]]:
    """Point the handlers that write to the terminal at `stream`, and return (handler, old stream).

    A handler keeps the stream it was made with: a message would land inside the bar.
    """
    moved: list[tuple[logging.StreamHandler[Any], Any]] = []
    loggers = [logging.root, *map(logging.getLogger, logging.root.manager.loggerDict)]
    for handler in (handler for owner in loggers for handler in owner.handlers):
        if isinstance(handler, logging.StreamHandler) and handler.stream in before:
            moved.append((handler, handler.stream))
            handler.setStream(stream)
    return moved


def open_console(kind: str, eta: Eta, done_tokens: int, every_steps: int) -> Console:
    """A console of one of KINDS; "auto" is "bar" where stderr is a terminal, "plain" elsewhere."""
    if kind not in KINDS:
        raise ValueError(f"console = {kind!r}: must be one of {', '.join(KINDS)}")
    if kind == "auto":
        kind = "bar" if sys.stderr.isatty() else "plain"
    if kind == "bar":
        return Bar(eta, done_tokens)
    return Lines(eta, every_steps) if kind == "plain" else Console()
