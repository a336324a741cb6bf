"""A run's checkpoints: saved from, and loaded into, the run's state and the engine (L2)."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from megagpt.checkpoint import CheckpointRecord, Saver, list_checkpoints, resume, start_from
from megagpt.checkpoint.journal import Journal, read_journal
from megagpt.checkpoint.record import set_aside
from megagpt.config import RunConfig
from megagpt.engine import Engine
from megagpt.errors import DamageError, UsageError
from megagpt.order.loader import TokenLoader
from megagpt.plan.layout import Layout
from megagpt.run.folder import versions
from megagpt.run.state import RunState, crossed

log = logging.getLogger("megagpt.train")

RECENT = 5
"""Saves that tell how long the next one takes."""
History = list[tuple[float, float]]
"""(loss, gradient norm) of the latest steps, by which spikes are judged."""


class Checkpoints:
    """All ranks make one and call its methods together."""

    def __init__(
        self,
        config: RunConfig,
        layout: Layout,
        engine: Engine,
        loader: TokenLoader,
        problems: Callable[[], list[str]] = list,
    ) -> None:
        """problems: what is wrong with the engine's state as it was loaded, on any rank."""
        self.config, self.layout, self.engine, self.loader = config, layout, engine, loader
        self.problems = problems
        self.folder = Path(config.output)
        vocabulary = b"" if engine.ranks.rank else loader.vocabulary()  # one rank writes it
        self.saver = Saver(self.folder, config, engine, vocabulary)
        self.save_s = self.saving_since = 0.0
        """Seconds of the slowest checkpoint, from its begin to its end; when the last one began."""
        self.begun = self.saved = 0
        """Tokens consumed at the newest checkpoint that was begun; at the newest that is valid."""
        self.init_from: dict[str, object] | None = None
        """What the weights were that this start has read; None: none."""

    def exist(self) -> bool:
        """Whether the run folder has a checkpoint, as rank 0 sees it."""
        return self.engine.by_first(lambda: bool(list_checkpoints(self.folder)))

    def resume(self, allow_changes: bool) -> tuple[RunState, History, int]:
        """The state of the newest whole checkpoint, loaded into the engine, and the steps in a row
        that had no update before it; a new run's, with the weights of `init_from` where the run
        file names some, where there is none.

        Raises UsageError when the samples of its last step are no longer the ones it was trained
        on, DamageError when the journal is not the checkpoint's, and what
        `megagpt.checkpoint.resume` raises.
        """
        self.saver.settle()
        saved = self._load(allow_changes)
        while problems := self.problems():
            self._set_aside(problems)
            saved = self._load(allow_changes)
        journal = Journal(self.engine.by_first(lambda: read_journal(self.folder).entries))
        if saved is None:
            return RunState(journal=journal), [], 0
        journal = journal.agree(saved.rollbacks, self.folder)
        run = RunState(
            step=saved.step,
            tokens=saved.tokens,
            skipped_steps=saved.skipped_steps,
            samples=saved.samples,
            journal=journal,
        )
        known = saved.data.get("vocabulary", ""), self.loader.tokenizer_fingerprint
        if not allow_changes and all(known) and len(set(known)) > 1:
            raise UsageError(
                f"{self.folder}: step {saved.step} was trained with the tokenizer "
                f"{saved.data['tokenizer']} ({known[0][:12]}...), but the data are of "
                f"{self.loader.tokenizer_name} ({known[1][:12]}...), whose ids mean other text; "
                "give the corpus that it was trained on, or pass --allow-changes"
            )
        if not allow_changes and self._digest(run, saved) not in (saved.data.get("digest"), ""):
            raise UsageError(
                f"{self.folder}: the samples of step {saved.step} are not the ones that it was "
                "trained on; the data order has changed since (another version of megagpt, or "
                "other shards); go back to what it was, or pass --allow-changes"
            )
        log.info("resuming at step %d (%s tokens)", saved.step, f"{saved.tokens:,}")
        self.begun = self.saved = saved.tokens
        recent = [(loss, norm) for loss, norm in saved.recent]
        return run, recent, saved.data.get("skipped_in_a_row", 0)

    def _load(self, allow_changes: bool) -> CheckpointRecord | None:
        """Loads the newest whole checkpoint; None where there is none, and the weights are the
        initial ones or those of `init_from`."""
        known = self.loader.known_fingerprints
        saved = resume(self.folder, self.config, self.engine, known, allow_changes)
        if saved is None and self.config.init_from:
            tokenizer = self.loader.tokenizer_name, self.loader.tokenizer_fingerprint
            self.init_from = start_from(self.config, self.engine, tokenizer)
        return saved

    def _set_aside(self, problems: list[str]) -> None:
        """Puts the checkpoint that was loaded aside: an earlier version may have saved what is not
        sound. Raises DamageError where there is none before it."""
        folders = self.engine.by_first(lambda: list_checkpoints(self.folder))
        listed = "\n".join(f"  - {problem}" for problem in problems)
        if len(folders) < 2:
            place = folders[0] if folders else self.config.init_from or "the initial state"
            raise DamageError(
                f"{place}: weights or moments are what no training makes of them:\n{listed}\n"
                "restore a checkpoint from a copy, or use another output to start anew"
            )
        if self.engine.ranks.rank == 0:
            aside = set_aside(folders[-1])
            log.error("not sound, set aside as %s:\n%s", aside, listed)
        self.engine.barrier()

    def _digest(self, run: RunState, saved: CheckpointRecord) -> str:
        """Names the samples of the checkpoint's last step as they would be read now; "" where it
        cannot be told which they were."""
        if "latest" in saved.data:
            first, count = saved.data["latest"]
        else:  # a checkpoint of November 2026 or before says it by the schedule alone
            try:
                tokens, batch_tokens = self.config.schedule.position(saved.step - 1)
            except ValueError:  # it had gone on with another batch, under --allow-changes
                return ""
            first = run.first_sample(self.config, saved.step - 1, tokens)
            count = batch_tokens // self.config.model.n_ctx
        return self.loader.digest(first, count)

    def due(self, run: RunState) -> bool:
        """Whether a multiple of checkpoint.every_tokens was passed since the last was begun."""
        return crossed(self.config.checkpoint.every_tokens, self.begun, run.tokens)

    def save(self, run: RunState, history: History, skipped: int) -> None:
        """Begins a checkpoint of where the run is; `skipped` steps in a row had no update."""
        assert run.latest is not None, "nothing was trained yet"
        self.saving_since = time.monotonic()
        optimizer, layout = self.engine.optimizer_state(), self.layout
        latest = run.latest.first_sample, run.latest.n_samples
        # Since the last that is there, not since the last step: saves need not fall on multiples.
        milestone = crossed(self.config.checkpoint.keep_every_tokens, self.saved, run.tokens)
        self.begun = run.tokens
        record = CheckpointRecord(
            step=run.step,
            tokens=run.tokens,
            samples=run.samples,
            seed=self.config.seed,
            skipped_steps=run.skipped_steps,
            updates=optimizer.updates,
            loss_scale=optimizer.loss_scale,
            layout={"world": layout.world, "pipeline": layout.pipeline, "tensor": layout.tensor},
            data={
                "fingerprint": self.loader.fingerprint(run.samples),
                "tokenizer": self.loader.tokenizer_name,
                "vocabulary": self.loader.tokenizer_fingerprint,
                "latest": list(latest),
                "digest": self.loader.digest(*latest),
                "skipped_in_a_row": skipped,
            },
            versions=versions(),
            milestone=milestone,
            files=(),
            recent=tuple(history),
            rollbacks=run.journal.entries,
        )
        self.saver.begin(record)

    def finish(self, last: bool = False) -> dict[str, object]:
        """Makes the checkpoint that was begun valid; what is to be recorded of it, if any."""
        folder = self.saver.finish(last)
        if folder is None:
            return {}
        self.saved = self.begun
        save_s = time.monotonic() - self.saving_since
        self.save_s = max(self.save_s, save_s)
        facts: dict[str, object] = {"folder": str(folder), "stall_s": round(self.saver.stall_s, 3)}
        return facts | {"save_s": round(save_s, 3)}

    def recall(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Takes up how long a save of this run takes, by the latest of them before this start."""
        latest = [float(record["save_s"]) for record in records][-RECENT:]
        self.save_s = max([self.save_s, *latest])
