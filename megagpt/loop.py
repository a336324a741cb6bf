"""The training loop (L3): ten numbered lines, the same under every layout.

Who calls what: `megagpt.train` reads the run file and joins the ranks, then makes one Trainer on
each; the engine knows DeepSpeed, the checkpoints know files. All ranks run every line together.
"""

import dataclasses
import logging
import math
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

from megagpt.cluster.process import long_work
from megagpt.cluster.ranks import Ranks
from megagpt.cluster.stop import StopRequest
from megagpt.cluster.watchdog import Watchdog
from megagpt.config import RunConfig
from megagpt.engine import StepResult, build_engine
from megagpt.engine.slices import gather_whole
from megagpt.errors import Stopped, UnsoundError
from megagpt.health.meter import Meter
from megagpt.health.replicas import check_replicas
from megagpt.health.soundness import Soundness
from megagpt.health.spikes import SpikeDetector
from megagpt.order.fitting import check_vocabulary
from megagpt.order.loader import training_loader, validation_loaders
from megagpt.plan.layout import Layout, micro_batch_of
from megagpt.run.evaluation import Evaluation
from megagpt.run.folder import make_run_folder, open_log, write_run_files
from megagpt.run.inputs import check_data
from megagpt.run.saving import Checkpoints
from megagpt.run.state import RunState, Step, crossed
from megagpt.use.samples import write_samples

log = logging.getLogger("megagpt.train")


class Agreed(NamedTuple):
    """What all ranks agree on after a step."""

    stopping: bool
    """A rank was asked to stop."""
    saved: bool
    """Every rank has written its part of the checkpoint that was begun."""
    rolls_back: bool
    """The step spiked and the run file asks for a rollback."""


class Trainer:
    """A run on this rank. Its life: made (weights initialised) -> start (loaded from the newest
    checkpoint, where there is one) -> run -> close. `run` is the loop to read."""

    def __init__(
        self,
        config: RunConfig,
        layout: Layout,
        ranks: Ranks,
        ds_config: dict[str, object],
        watchdog: Watchdog | None = None,
    ) -> None:
        self.config, self.layout, self.ranks = config, layout, ranks
        self.ds_config = ds_config
        self.folder = Path(config.output)
        # Where checksums are compared, each rank looks at its share of the files then.
        sizes = not config.data.verify and ranks.local_rank == 0
        self.loader = training_loader(config, sizes)
        self.validation = validation_loaders(config, sizes)
        check_vocabulary(config, [self.loader, *self.validation])
        self.engine = build_engine(config, layout, ranks, ds_config)
        # A sample that is classified weighs as much as any other, whatever its length.
        masked = any(loader.masked for loader in [self.loader, *self.validation])
        self.engine.masked = masked and not config.model.classes
        self.evaluation = Evaluation(config, layout, self.engine, self.validation)
        self.soundness = Soundness(config, self.engine)
        self.checkpoints = Checkpoints(
            config, layout, self.engine, self.loader, partial(self.soundness.look, anew=True)
        )
        self.spikes = SpikeDetector(config.optimizer.spike_window, config.optimizer.spike_threshold)
        self.meter = Meter(config, layout, self.engine)
        self.watchdog = watchdog or Watchdog(self.folder, ranks, minutes=0)
        self.compared = False
        """Whether the copies of the weights were found equal after the latest step."""
        self.losses: dict[str, float] = {}
        """What the latest step and the evaluation after it made of the weights, nats a token."""

    def run(self, stop: StopRequest, allow_changes: bool) -> None:
        """From wherever the run folder is to the end of the run. Raises Stopped when asked to."""
        run = self.start(allow_changes)  # 1) where the run is: at its start or newest checkpoint
        if run.step == 0:
            self.evaluate(run)
        while run.tokens < self.config.schedule.total_tokens:
            step = run.next_step(self.config)  # 2) which samples, how many, at what rate
            result = self.train_step(run, step)  # 3) forward, backward, update on all ranks
            before, run = run, run.after(step, result)  # 4) where the run is then
            spike = self.record(before, run, step, result)  # 5) what is written of the step
            agreed = self.agree(stop, spike)  # 6) what all ranks agree on
            if agreed.rolls_back and (earlier := self.roll_back(run, spike)):
                run = earlier  # 7) back to the newest checkpoint, behind the spike's samples
                continue
            last = self.finished(run) or agreed.stopping
            self.evaluate_if_due(before, run)  # 8) what is due: an evaluation,
            self.save_if_due(run, agreed.saved, last)  # 9) a checkpoint, if the state is sound,
            self.leave_if_asked(run, stop, agreed.stopping)  # 10) an early end

    # --- the lines of the loop ------------------------------------------------------------------

    def start(self, allow_changes: bool) -> RunState:
        """Compares what will be read with its checksums, loads the newest whole checkpoint, opens
        the log."""
        self.watchdog.begin("start")
        if self.config.data.verify:
            loaders = [self.loader, *self.validation]
            check_data(loaders, self.folder, self.engine, long_work(self.watchdog.alive))
        run, self.spikes.history, self.spikes.skipped = self.checkpoints.resume(allow_changes)
        # Not before: a run that is refused leaves the folder as it is.
        self.open_log(run)
        self.meter.recall(self.log.records("noise_trace"))
        self.checkpoints.recall(self.log.records("save_s"))
        return run

    def train_step(self, run: RunState, step: Step) -> StepResult:
        """The step on this rank's share of its samples, which are read ahead for the next one."""
        self.watchdog.begin("step")
        self.meter.begin(step.number)
        with self.engine.clock.part("data"):
            batches = list(self.loader.micro_batches(*self._share(step)))
            if step.tokens < self.config.schedule.total_tokens:
                following = run.step_at(self.config, step.number, step.tokens)
                self.loader.prefetch(*self._share(following))
        skips = None
        if run.journal.skips_update(step.number):  # decided before this start
            skips = _always
        elif self.config.optimizer.spike_action == "skip":
            skips = self._spikes
        return self.engine.train_step(batches, step.lr, run.step, skips, step.n_samples)

    def _share(self, step: Step) -> tuple[int, int, int, int, int]:
        """The loader's arguments for this rank's samples of a step."""
        rank = self.layout.data_rank(self.ranks.rank)
        micro_batch = micro_batch_of(self.config, self.layout, step.batch_tokens)
        return step.first_sample, step.n_samples, rank, self.layout.data, micro_batch

    def _spikes(self, loss: float, norm: float) -> bool:
        return bool(self.spikes.verdict(loss, norm))

    def record(self, before: RunState, run: RunState, step: Step, result: StepResult) -> str:
        """Writes what the step was; why it is a spike, "" when it is none."""
        measured = self.meter.end(result, step.batch_tokens, step.lr)
        if self.log.displaced():
            self.log.close()
            self.watchdog.keeps = make_run_folder(self.config)
            log.error(
                "%s, or the record in it, was moved, replaced or removed under the run, which goes "
                "on with what is there now; what is missing of its record is told next",
                self.folder,
            )
            self.open_log(before)
        self.log.step(self._figures(run, step, result) | measured)
        if self.meter.table:
            self.log.profile(self.meter.table)
        self.losses = {"loss": result.loss} if result.scored else {}
        spike = self.spikes.add(result.loss, result.grad_norm, result.applied)
        if spike or result.skipped:
            update = "left out" if result.skipped else "made"
            self.log.event("spike", reason=spike, update=update)
        if run.journal is not before.journal and self.ranks.rank == 0:
            run.journal.write(self.folder, reason=spike)
        if result.applied:
            self.soundness.after_update(step.lr)
        self.compared = crossed(self.config.log.check_replicas_every_steps, before.step, run.step)
        if self.compared:
            check_replicas(self.engine, run.step)
        return spike

    def _figures(self, run: RunState, step: Step, result: StepResult) -> dict[str, object]:
        """What metrics.jsonl says of the step beside what the meter measured."""
        sources = self.loader.consumed(run.samples)
        return {
            "step": run.step,
            "tokens": run.tokens,
            "samples": run.samples,
            "loss": result.loss,
            "lr": step.lr,
            "batch_tokens": step.batch_tokens,
            "grad_norm": result.grad_norm,
            "skipped_steps": run.skipped_steps,
            "digest": self.loader.digest(step.first_sample, step.n_samples),
            "sources": {s["name"]: {k: s[k] for k in ("tokens", "epochs")} for s in sources},
        }

    def agree(self, stop: StopRequest, spike: str) -> Agreed:
        """What every rank has to know of the others before it goes on: one small all-reduce."""
        saver = self.checkpoints.saver
        unready = saver.busy and not saver.ready
        rolls_back = bool(spike) and self.config.optimizer.spike_action == "rollback"
        asked = [stop.look(self.checkpoints.save_s), unready, rolls_back]
        stopping, waiting, spiking = self.engine.total(asked)
        # Loss and norm are the same everywhere, so ranks that judge differently are broken.
        assert spiking in (0, self.ranks.world), "ranks disagree about a spike"
        return Agreed(stopping > 0, saver.busy and waiting == 0, spiking > 0)

    def roll_back(self, run: RunState, reason: str) -> RunState | None:
        """The newest checkpoint, going on behind the samples of the step that spiked, which the
        journal tells; None, with nothing done, while there is no checkpoint."""
        self.finish_saving()
        if not self.checkpoints.exist():
            return None
        behind = run.first_sample(self.config, run.step - 1, run.tokens)
        self.log.close()
        earlier = self.start(allow_changes=True)
        skipped = behind - earlier.tokens // self.config.model.n_ctx
        earlier = earlier.replaced(journal=earlier.journal.add(earlier.step, skipped))
        facts = {"spiked_step": run.step, "reason": reason}
        if self.ranks.rank == 0:
            earlier.journal.write(self.folder, **facts)
        skipped = earlier.journal.skipped_samples(earlier.step)
        self.log.event("rollback", skipped_samples=skipped, **facts)
        return earlier

    def evaluate_if_due(self, before: RunState, run: RunState) -> None:
        """Every evaluate.every_tokens tokens and at the end."""
        if self.finished(run) or crossed(
            self.config.evaluate.every_tokens, before.tokens, run.tokens
        ):
            self.evaluate(run)

    def save_if_due(self, run: RunState, saved: bool, last: bool) -> None:
        """Every checkpoint.every_tokens tokens and before the process ends; a checkpoint that all
        ranks have written becomes valid. After a step without an update it waits for the next.

        Raises UnsoundError for a run that makes no update any more and for a state that no
        training makes, DamageError for copies that differ; nothing of it is saved then.
        """
        self.give_up_if_idle(run)
        if saved:
            self.finish_saving()
        if last or (self.checkpoints.due(run) and not self.spikes.skipped):
            self.finish_saving()
            if not self.compared:
                check_replicas(self.engine, run.step)
            if problems := self.soundness.look():
                raise UnsoundError(_unsound(run.step, problems))
            self.checkpoints.save(run, self.spikes.history, self.spikes.skipped)
        if last:
            self.finish_saving(last=True)
            if self.finished(run):
                self.log.complete()
                # A run that is stopped has no time for it; its next start removes the rest.
                self.checkpoints.saver.settle()

    def give_up_if_idle(self, run: RunState) -> None:
        """Raises UnsoundError for a run that makes no update any more or ends without a loss that
        is a number. It saves nothing, so that no checkpoint from before is retired for it; one that
        was begun is finished."""
        limit = self.config.optimizer.max_skipped_steps
        # A run that ends before the limit must have made some update all the same.
        if why := self.spikes.give_up(min(limit, run.step) if self.finished(run) else limit):
            self.finish_saving(last=True)
            raise UnsoundError(f"step {run.step}, not saved: {why}")
        lost = [name for name, value in self.losses.items() if not math.isfinite(value)]
        if lost and self.finished(run):
            self.finish_saving(last=True)
            verb = "are" if len(lost) > 1 else "is"
            raise UnsoundError(
                f"step {run.step}, the last, not saved: its {' and its '.join(lost)} {verb} not "
                "finite; lower schedule.peak_lr, or look at the data of the last steps, and run "
                "again to go on from the checkpoint before"
            )

    def leave_if_asked(self, run: RunState, stop: StopRequest, stopping: bool) -> None:
        """Raises Stopped for a run that was asked to stop before its end; it is saved."""
        if stopping and not self.finished(run):
            raise Stopped(
                f"stopped by {stop.reason or 'a signal or limit of another rank'} at step "
                f"{run.step}, saved; run the same command again to go on"
            )

    # --- parts of them --------------------------------------------------------------------------

    def open_log(self, run: RunState) -> None:
        """The files of the run folder and its record, cut back to where the run is."""
        if self.ranks.rank == 0:
            computing = dataclasses.asdict(self.engine.choices)
            source = self.checkpoints.init_from
            write_run_files(self.config, run, self.layout, self.ds_config, computing, source)
        self.log = open_log(self.config, run, writer=self.ranks.rank == 0)

    def finished(self, run: RunState) -> bool:
        """Whether all tokens were trained on."""
        return run.tokens >= self.config.schedule.total_tokens

    def evaluate(self, run: RunState) -> None:
        """The loss on every validation set and the texts, recorded."""
        self.watchdog.begin("evaluation")
        t0 = time.perf_counter()
        record = self.evaluation.losses()
        made: list[str] | bytes = []
        if self.config.evaluate.samples:
            # Rank 0 writes them with a model of its own; the others wait meanwhile.
            device = self.engine.device if self.ranks.rank == 0 else None
            weights = gather_whole(self.engine.slices())
            source = (self.validation or [self.loader])[0]
            made = write_samples(self.config, weights, source, device)
        if record:
            if self.evaluation.scored:
                self.losses["validation loss"] = float(str(record["validation_loss"]))
            record |= {"evaluate_s": time.perf_counter() - t0}
            self.log.evaluation({"step": run.step, "tokens": run.tokens} | record)
        self.log.samples(made)

    def finish_saving(self, last: bool = False) -> None:
        """Makes the checkpoint that was begun valid, and records it."""
        self.watchdog.begin("saving")
        self.log.sync()  # a checkpoint never has steps that the record could lose
        if facts := self.checkpoints.finish(last):
            self.log.event("checkpoint", **facts)

    def close(self) -> None:
        """Closes files and the engine; the process group stays."""
        table = self.meter.close()
        if hasattr(self, "log"):
            if table:
                self.log.profile(table)
            self.log.close()
        self.loader.close()
        self.engine.close()


def _unsound(step: int, problems: list[str]) -> str:
    return (
        f"after step {step} weights or moments are what no training makes of them:\n"
        + "\n".join(f"  - {problem}" for problem in problems)
        + "\nnothing of it was saved: run again to go on from the checkpoint before. If the same "
        "comes back at the same step, lower schedule.peak_lr (with --allow-changes) or look at the "
        "data; else the hardware of that rank is suspect"
    )


def _always(loss: float, norm: float) -> bool:
    return True
