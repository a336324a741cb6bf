"""RunLog: one call a step, and the step is in metrics.jsonl, TensorBoard and on the screen."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megagpt.files import write_durably, write_file
from megagpt.log.boards import Board, open_boards
from megagpt.log.console import Console, logger, open_console
from megagpt.log.environment import environment
from megagpt.log.eta import Eta
from megagpt.log.markdown import cell, code_block
from megagpt.log.metrics import NAME, Cut, MetricsFile, cut, decode, plain
from megagpt.log.repair import recorded
from megagpt.log.tags import derived, tags

_COMPLETE = "complete"
"""The event at the end of a run."""
_CONFIGURATION = ("config.toml", "ds_config.json", "run.json")
"""Files of the run folder that go to TensorBoard as text, where they are there."""


@dataclass
class RunLog:
    """Writes what happens in the run of `folder`. With writer=False every method does nothing.

    Opening it cuts metrics.jsonl and the TensorBoard events back to the step where training goes
    on, and records a "start" or "resume" event; "resume" says what the restart cost. A run that
    is finished gets neither.
    """

    folder: Path
    _: KW_ONLY
    total_tokens: int
    """Tokens of the whole run."""
    resume_tokens: int
    """Tokens consumed where this session begins; 0 at the start of a run."""
    resume_step: int
    """Steps done where this session begins."""
    tensorboard: bool = True
    every_steps: int = 1
    """Steps between two plain lines; metrics.jsonl and TensorBoard get every step."""
    writer: bool = True
    """True on exactly one rank."""
    console: str = "auto"
    """bar, plain, off, or auto: a bar where stderr is a terminal, plain lines elsewhere."""
    batch: Callable[[int], int] | None = None
    """Batch size (tokens) of the step that starts at so many tokens consumed, for the ETA."""
    wandb: str = ""
    """Project of Weights & Biases; empty: none."""

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)
        self._step, self._tokens = self.resume_step, self.resume_tokens
        self._eta = Eta(self.total_tokens, self.batch)
        self._metrics: MetricsFile | None = None
        self._boards: list[Board] = []
        self._console = Console()
        if self.writer:
            self._open()

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / NAME
        kind, facts = "start", {}
        if self.resume_step or (path.exists() and path.stat().st_size > 0):
            events = self.folder / "tensorboard"
            found = cut(path, self.resume_step, partial(recorded, events))
            kind, facts = "resume", _cost(found, self.resume_tokens)
        self._metrics = MetricsFile(path)
        before = [(r["event"], r["step"]) for r in self.records("event")[-1:]]
        if before == [(_COMPLETE, self.resume_step)] and self.resume_step:
            # It was done, and trains longer now: the time between is nobody's loss.
            facts |= {"down_s": 0.0, "paused_s": facts["down_s"]}
        self._boards = open_boards(self.folder, self.tensorboard, self.wandb, self.resume_tokens)
        self._console = open_console(self.console, self._eta, self.resume_tokens, self.every_steps)
        # A finished run that is started again only says what it reached: no pause of training.
        if kind == "start" or self.resume_tokens < self.total_tokens:
            self.event(kind, **facts)
        self._describe()

    def _describe(self) -> None:
        """Configuration and environment, as texts."""
        for name in _CONFIGURATION:
            if (path := self.folder / name).is_file():
                self.text(f"run/{name}", code_block(path.read_text()), self.resume_tokens)
        table = "\n".join(
            f"| {cell(name)} | {cell(value)} |" for name, value in environment().items()
        )
        self.text("run/environment", "| | |\n|---|---|\n" + table, self.resume_tokens)

    def step(self, record: Mapping[str, Any]) -> None:
        """A step is done. Keys: step and tokens (both after the step), samples, loss (nats per
        token), lr, batch_tokens, grad_norm, tokens_per_s, and any other number or record of
        numbers, such as step_s, mfu or sources = {name: {tokens, epochs}}."""
        if self._metrics is None:
            return
        record = plain(record)
        self._step, self._tokens = record["step"], record["tokens"]
        if (step_s := _step_s(record)) > 0:
            self._eta.observe(record["batch_tokens"], step_s)
        self._record(record)
        self._console.step(record)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """An evaluation is done. Keys: step, tokens, validation_loss (nats per token), and
        validation_losses = {name of the set: loss} where there are several sets."""
        if self._metrics is None:
            return
        record = plain(record)
        self._record(record)
        self._console.evaluation(record)

    def _record(self, record: Mapping[str, Any]) -> None:
        assert self._metrics is not None
        now = round(time.time(), 3)
        self._metrics.write({**record, "time": now})
        if self._boards:
            self._figures(tags(record) | derived(record), int(record["tokens"]), now)

    def _figures(self, values: Mapping[str, float], tokens: int, now: float) -> None:
        for board in self._boards:
            board.scalars(values, tokens, now)

    def text(self, tag: str, text: str, tokens: int) -> None:
        """A text (Markdown) for TensorBoard."""
        for board in self._boards:
            board.text(tag, text, tokens)

    def samples(self, texts: Sequence[str] | bytes) -> None:
        """Texts of the model as it is, or a PNG of its images: a file in samples/, and boards."""
        if self._metrics is None or not texts:
            return
        path = self.folder / "samples" / f"step_{self._step:08d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(texts, bytes):
            write_durably(path.with_suffix(".png"), texts)
            for board in self._boards:
                board.image("samples", texts, self._tokens)
            return
        numbered = list(enumerate(texts, start=1))
        parts = (f"--- {number} of {len(texts)} ---\n{text}\n" for number, text in numbered)
        write_file(path, "".join(parts))
        for number, text in numbered:
            self.text(f"samples/{number}", code_block(text), self._tokens)

    def profile(self, table: str) -> None:
        """The costliest operations of the steps that were profiled."""
        if self._metrics is not None:
            logger.info("%s", table)
            self.text("run/profile", code_block(table), self._tokens)

    def records(self, name: str) -> list[dict[str, Any]]:
        """The records of metrics.jsonl that have the figure; none where this is not the writer."""
        if self._metrics is None:
            return []
        # A long run has hundreds of thousands of lines: only those in question are read as JSON.
        with (self.folder / NAME).open("rb") as file:
            records = [decode(line) for line in file if f'"{name}":'.encode() in line]
        return [record for record in records if name in record]

    def event(self, kind: str, **facts: Any) -> None:
        """Something that is no step: a checkpoint, a spike, a stop. A line in metrics.jsonl with
        "event": kind, at the last step seen."""
        if self._metrics is None:
            return
        now = round(time.time(), 3)
        record = {"event": kind, "step": self._step, "tokens": self._tokens, "time": now, **facts}
        self._metrics.write(record)
        self._console.event(record)
        if "stall_s" in facts:
            self._figures({"x_time/checkpoint_stall_s": float(facts["stall_s"])}, self._tokens, now)

    def complete(self) -> None:
        """The run is done, and its last checkpoint whole: what may follow is no restart."""
        self.event(_COMPLETE)

    def sync(self) -> None:
        """Returns once all that was recorded is on the disk."""
        if self._metrics:
            self._metrics.sync()
        for board in self._boards:
            board.sync()

    def displaced(self) -> bool:
        """Whether a file of the record, or the run's folder, was moved, replaced or removed."""
        if self._metrics is None:
            return False
        return self._metrics.displaced() or any(board.displaced() for board in self._boards)

    def close(self) -> None:
        """Close all files; a second call does nothing."""
        self._console.close()
        for board in self._boards:
            board.close()
        if self._metrics:
            self._metrics.close()
        self._metrics, self._boards, self._console = None, [], Console()


def _step_s(record: Mapping[str, Any]) -> float:
    """Seconds of the step, 0.0 where the record does not tell."""
    if "step_s" in record:
        return float(record["step_s"])
    speed = float(record.get("tokens_per_s") or 0.0)
    return float(record.get("batch_tokens") or 0) / speed if speed else 0.0


def _cost(found: Cut, resume_tokens: int) -> dict[str, Any]:
    """What a restart cost: work done twice, time without work, and what the record has lost."""
    steps = [record for record in found.dropped if "loss" in record]
    end_tokens = max((record["tokens"] for record in steps), default=resume_tokens)
    down_s = max(0.0, time.time() - found.last_time) if found.last_time else 0.0
    lost = {"restored_steps": found.restored, "missing_steps": found.missing}
    return {
        **{key: value for key, value in (lost | {"broken_file": found.aside}).items() if value},
        "lost_steps": len(steps),
        "lost_tokens": end_tokens - resume_tokens,
        "lost_s": round(sum(_step_s(record) for record in steps), 3),
        "down_s": round(down_s, 3),
    }
