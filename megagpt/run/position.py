"""Where a run is: its progress, the samples that its steps read, its checkpoints (L3)."""

import logging
import time
from pathlib import Path

from megagpt.config import RunConfig
from megagpt.engine import Engine, SkipUpdate
from megagpt.errors import UsageError
from megagpt.health.spikes import Recent
from megagpt.order.loader import TokenLoader
from megagpt.plan.layout import Layout
from megagpt.run.folder import versions
from megagpt.run.journal import Journal
from megagpt.run.state import Progress

log = logging.getLogger("megagpt.train")


class Position:
    """A run's state beside its weights. All ranks make one and call `resume`, `save` and
    `finish_saving` together."""

    def __init__(
        self, config: RunConfig, layout: Layout, engine: Engine, loader: TokenLoader
    ) -> None:
        from megagpt.checkpoint import Saver

        self.config, self.layout, self.engine, self.loader = config, layout, engine, loader
        self.folder = Path(config.output)
        self.progress = Progress()
        self.journal = Journal()
        self.recent = Recent(config.optimizer.spike_window, config.optimizer.spike_threshold)
        self.saver = Saver(self.folder, config, engine)
        self.save_s = self.saving_since = 0.0
        """Seconds of the slowest checkpoint; when the last one began."""

    # --- samples --------------------------------------------------------------------------------

    def first_sample(self, step: int, tokens: int) -> int:
        """The sample at `tokens` trained on, of the step that follows `step` steps."""
        return tokens // self.config.model.n_ctx + self.journal.skipped(step)

    def samples(self, step: int, tokens: int, size: int) -> tuple[int, int, int, int, int]:
        """The loader's arguments for this rank's part of a step of `size` tokens."""
        first, count = self.first_sample(step, tokens), size // self.config.model.n_ctx
        rank = self.layout.data_rank(self.engine.ranks.rank)
        return first, count, rank, self.layout.data, self.config.parallel.micro_batch

    def digest(self, step: int) -> str:
        """Names the samples of a step, counted from 1, and their order."""
        tokens, size = self.config.schedule.position(step - 1)
        first = self.first_sample(step - 1, tokens)
        return self.loader.digest(first, size // self.config.model.n_ctx)

    def samples_done(self) -> int:
        """Samples consumed."""
        return self.first_sample(self.progress.step - 1, self.progress.tokens)

    # --- spikes ---------------------------------------------------------------------------------

    def leave_out(self) -> SkipUpdate | None:
        """What decides whether the next step's update is left out; None: it is made."""
        if self.journal.leaves_out(self.progress.step + 1):
            return lambda *_: True
        if self.config.optimizer.spike_action == "skip":
            return lambda loss, norm: bool(self.recent.judge(loss, norm))
        return None

    def left_out(self, reason: str) -> None:
        """The latest step's update was left out: the journal tells it, once."""
        if self.journal.leaves_out(self.progress.step):
            return
        self.journal.leave_out(self.progress.step)
        if self.engine.ranks.rank == 0:
            self.journal.write(self.folder, reason=reason)

    # --- checkpoints ----------------------------------------------------------------------------

    def resume(self, allow_changes: bool) -> None:
        """Goes to the newest whole checkpoint; stays at the start where there is none.

        Raises UsageError when the samples of its last step are no longer the ones it was trained
        on, and what `megagpt.checkpoint.resume` raises.
        """
        from megagpt.checkpoint import resume
        from megagpt.run.journal import read_journal

        fingerprint = self.loader.fingerprint
        saved = resume(self.folder, self.config, self.engine, fingerprint, allow_changes)
        self.journal = Journal(self.engine.gather(read_journal(self.folder))[0])
        if saved is None:
            return
        self.progress = Progress(
            step=saved.step, tokens=saved.tokens, skipped_steps=saved.skipped_steps
        )
        self.journal = self.journal if self.journal.entries else Journal(saved.rollbacks)
        self.recent.pairs = [(loss, norm) for loss, norm in saved.recent]
        if not allow_changes and self.digest(saved.step) != saved.data.get("digest"):
            raise UsageError(
                f"{self.folder}: the samples of step {saved.step} are not the ones that it was "
                "trained on; the data order has changed since (another version of megagpt, or "
                "other shards); go back to what it was, or pass --allow-changes"
            )
        log.info("resuming at step %d (%s tokens)", saved.step, f"{saved.tokens:,}")

    def save(self, milestone: bool) -> None:
        """Begins a checkpoint of where the run is."""
        from megagpt.checkpoint import Manifest

        self.saving_since = time.monotonic()
        optimizer = self.engine.optimizer_state()
        progress, layout = self.progress, self.layout
        split = {"world": layout.world, "pipeline": layout.pipeline, "tensor": layout.tensor}
        self.saver.begin(
            Manifest(
                step=progress.step,
                tokens=progress.tokens,
                samples=self.samples_done(),
                seed=self.config.seed,
                skipped_steps=progress.skipped_steps,
                updates=optimizer.updates,
                loss_scale=optimizer.loss_scale,
                layout=split,
                data={
                    "fingerprint": self.loader.fingerprint(self.samples_done()),
                    "tokenizer": self.loader.tokenizer_name,
                    "digest": self.digest(progress.step),
                },
                versions=versions(),
                milestone=milestone,
                files=(),
                recent=tuple(self.recent.pairs),
                rollbacks=tuple(self.journal.entries),
            )
        )

    def finish_saving(self, last: bool = False) -> dict[str, object]:
        """Makes the checkpoint that was begun valid; what is to be recorded of it, if any."""
        folder = self.saver.finish(last)
        if folder is None:
            return {}
        self.save_s = max(self.save_s, time.monotonic() - self.saving_since)
        return {"folder": str(folder), "stall_s": round(self.saver.stall_s, 3)}
