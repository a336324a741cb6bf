"""Training: the loop on one page, for every layout (L3).

    deepspeed --num_gpus 2 --module megagpt.train launch/runs/quickstart.toml
    torchrun --nproc-per-node 2 -m megagpt.train RUN.toml schedule.peak_lr=1e-3
    python -m megagpt.train RUN.toml

Training again with the same run folder resumes at the exact step. SIGTERM, SIGINT (Ctrl-C) and
SIGUSR1 save a checkpoint and end with exit code 75.
"""

import argparse
import errno
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megagpt.cluster.meeting import first_to_fail, join, leave
from megagpt.cluster.ranks import Ranks, discover, prepare_environment
from megagpt.cluster.stop import StopRequest
from megagpt.cluster.watchdog import Watchdog
from megagpt.config import RunConfig, load_run
from megagpt.errors import EXIT_DAMAGE, EXIT_FAILURE, EXIT_OK, MegagptError, Stopped
from megagpt.health.replicas import check_replicas
from megagpt.plan.ds_config import read_ds_config, resolve
from megagpt.plan.layout import Layout, layout_of
from megagpt.run.folder import make_run_folder, summary, write_run_files
from megagpt.run.state import crossed

if TYPE_CHECKING:
    from megagpt.engine import StepResult

log = logging.getLogger("megagpt.train")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk that takes no more."""


class Trainer:
    """A run on this rank: everything that the loop touches. All ranks make one together."""

    def __init__(
        self,
        config: RunConfig,
        layout: Layout,
        ranks: Ranks,
        ds_config: dict[str, object],
        watchdog: Watchdog | None = None,
    ) -> None:
        from megagpt.engine import build_engine
        from megagpt.health.meter import Meter
        from megagpt.order.loader import TokenLoader, training_loader
        from megagpt.run.evaluation import Evaluation
        from megagpt.run.inputs import check_vocabulary
        from megagpt.run.position import Position

        self.config, self.layout, self.ranks = config, layout, ranks
        self.ds_config = ds_config
        self.folder = Path(config.output)
        n_ctx, validation = config.model.n_ctx, config.data.validation
        self.loader = training_loader(config)
        self.validation = [TokenLoader([(Path(s.path), 1.0)], n_ctx, 0) for s in validation]
        check_vocabulary(config, [self.loader, *self.validation])
        self.engine = build_engine(config, layout, ranks, ds_config)
        tokenizer = self.loader.tokenizer_name
        self.evaluation = Evaluation(config, layout, self.engine, self.validation, tokenizer)
        self.at = Position(config, layout, self.engine, self.loader)
        self.meter = Meter(config, layout, self.engine)
        self.watchdog = watchdog or Watchdog(self.folder, ranks, minutes=0)
        self.spike = ""

    # --- the loop -------------------------------------------------------------------------------

    def run(self, stop: StopRequest, allow_changes: bool) -> None:
        """From wherever the run folder is to the end of the run. Raises Stopped when asked to."""
        self.start(allow_changes)
        config, end = self.config, self.config.schedule.total_tokens
        if self.at.progress.step == 0:
            self.evaluate()
        while self.at.progress.tokens < end:
            before = self.at.progress.tokens
            self.step()
            stopping, saved, spiking = self.agree(stop)
            if spiking and self.roll_back():
                continue
            tokens = self.at.progress.tokens
            failure = self.at.recent.failure(config.optimizer.max_skipped_steps)
            last = tokens >= end or stopping or bool(failure)
            if tokens >= end or crossed(config.evaluate.every_tokens, before, tokens):
                self.evaluate()
            if saved:
                self.finish_saving()
            if last or crossed(config.checkpoint.every_tokens, before, tokens):
                self.save(milestone=crossed(config.checkpoint.keep_every_tokens, before, tokens))
            if last:
                self.finish_saving(last=True)
            if failure:
                raise MegagptError(f"step {self.at.progress.step}, saved: {failure}")
            if stopping and tokens < end:
                raise Stopped(
                    f"stopped by {stop.reason or 'a signal or limit of another rank'} at step "
                    f"{self.at.progress.step}, saved; run the same command again to go on"
                )

    def step(self) -> None:
        """One training step, its record, and what is wrong with it."""
        schedule, before = self.config.schedule, self.at.progress
        self.watchdog.begin("step")
        self.meter.begin(before.step + 1)
        size = schedule.batch(before.tokens)
        tokens, step = before.tokens + size, before.step
        with self.engine.clock.part("data"):
            batches = list(self.loader.micro_batches(*self.at.samples(step, before.tokens, size)))
            if tokens < schedule.total_tokens:
                self.loader.prefetch(*self.at.samples(step + 1, tokens, schedule.batch(tokens)))
        leave_out = self.at.leave_out()
        result = self.engine.train_step(batches, schedule.lr(tokens), before.step, leave_out)
        self.at.progress = before.after(size, result.applied)
        measured = self.meter.end(result, size, schedule.lr(tokens))
        self.log.step(self._record(result, size) | measured)
        if self.meter.table:
            self.log.profile(self.meter.table)
        self.spike = self.at.recent.add(result.loss, result.grad_norm, result.applied)
        if self.spike or result.skipped:
            update = "left out" if result.skipped else "made"
            self.log.event("spike", reason=self.spike, update=update)
        if result.skipped:
            self.at.left_out(self.spike)
        every = self.config.log.check_replicas_every_steps
        if crossed(every, before.step, self.at.progress.step):
            check_replicas(self.engine, self.at.progress.step)

    def _record(self, result: "StepResult", size: int) -> dict[str, object]:
        """What metrics.jsonl says of the step that has just ended."""
        progress = self.at.progress
        samples = self.at.samples_done()
        return {
            "step": progress.step,
            "tokens": progress.tokens,
            "samples": samples,
            "loss": result.loss,
            "lr": self.config.schedule.lr(progress.tokens),
            "batch_tokens": size,
            "grad_norm": result.grad_norm,
            "skipped_steps": progress.skipped_steps,
            "digest": self.at.digest(progress.step),
            "sources": {
                s["name"]: {"tokens": s["tokens"], "epochs": s["epochs"]}
                for s in self.loader.consumed(samples)
            },
        }

    def evaluate(self) -> None:
        """The loss on every validation set and the texts, recorded."""
        progress = self.at.progress
        self.watchdog.begin("evaluation")
        t0 = time.perf_counter()
        record, texts = self.evaluation.losses(), self.evaluation.texts()
        if record:
            place = {"step": progress.step, "tokens": progress.tokens}
            self.log.evaluation(place | record | {"evaluate_s": time.perf_counter() - t0})
        self.log.samples(texts)

    def agree(self, stop: StopRequest) -> tuple[bool, bool, bool]:
        """(does any rank have to stop, is a checkpoint written by all, did the step spike)."""
        unready = self.at.saver.busy and not self.at.saver.ready
        rolls = bool(self.spike) and self.config.optimizer.spike_action == "rollback"
        stopping, waiting, spiking = self.engine.total([stop.look(self.at.save_s), unready, rolls])
        # Loss and norm are the same everywhere, so ranks that judge differently are broken.
        assert spiking in (0, self.ranks.world), "ranks disagree about a spike"
        return stopping > 0, self.at.saver.busy and waiting == 0, spiking > 0

    # --- state ----------------------------------------------------------------------------------

    def start(self, allow_changes: bool) -> None:
        """Checks what will be read, resumes from the newest whole checkpoint, opens the log."""
        from megagpt.run.folder import open_log
        from megagpt.run.inputs import check_data

        self.watchdog.begin("start")
        if self.config.data.verify:
            loaders = [self.loader, *self.validation]
            check_data(loaders, self.folder, self.engine, self.watchdog.alive)
        self.at.resume(allow_changes)
        # Not before: a run that is refused leaves the folder as it is.
        if self.ranks.rank == 0:
            write_run_files(self.config, self.layout, self.ds_config)
        self.log = open_log(self.config, self.at.progress, writer=self.ranks.rank == 0)
        self.meter.recall(self.log.records("noise_trace"))

    def roll_back(self) -> bool:
        """Goes back to the newest checkpoint and on behind the step that spiked, recorded in the
        journal; False, with nothing done, while there is no checkpoint."""
        from megagpt.checkpoint import list_checkpoints

        self.finish_saving()
        if not self.engine.gather(len(list_checkpoints(self.folder)))[0]:
            return False
        spiked, reason = self.at.progress.step, self.spike
        end = self.at.first_sample(spiked - 1, self.at.progress.tokens)
        self.log.close()
        self.start(allow_changes=True)
        step = self.at.progress.step
        self.at.journal.add(step, end - self.at.progress.tokens // self.config.model.n_ctx)
        facts = {"spiked_step": spiked, "reason": reason}
        if self.ranks.rank == 0:
            self.at.journal.write(self.folder, **facts)
        self.log.event("rollback", skipped_samples=self.at.journal.skipped(step), **facts)
        return True

    def save(self, milestone: bool) -> None:
        """Begins a checkpoint of where the run is."""
        self.watchdog.begin("saving")
        self.at.save(milestone)

    def finish_saving(self, last: bool = False) -> None:
        """Makes the checkpoint that was begun valid, and records it."""
        self.watchdog.begin("saving")
        if facts := self.at.finish_saving(last):
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


# --- the command --------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The command line of training."""
    made = argparse.ArgumentParser(
        prog="megagpt.train",
        description="Train a run file; with the same run folder again, resume at the exact step.",
        epilog="Exit codes: 0 done; 2 wrong usage or configuration; 3 damaged input; 75 stopped by "
        "a signal with a checkpoint saved; 1 anything else.",
    )
    made.add_argument("run", help="run file (.toml), for example launch/runs/quickstart.toml")
    made.add_argument("overrides", nargs="*", metavar="section.key=value", help="override of a key")
    made.add_argument(
        "--allow-changes",
        action="store_true",
        help="go on from a checkpoint although model, data, schedule, optimizer or seed changed",
    )
    # The deepspeed launcher adds this; the environment says the same.
    made.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = parser().parse_intermixed_args(argv)
    first = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) in ("0", "")
    level = logging.INFO if first else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    code = EXIT_FAILURE
    try:
        code = train(args.run, args.overrides, args.allow_changes)
    except MegagptError as error:
        code = error.exit_code
        if first_to_fail():
            print(f"megagpt: {error}", file=sys.stderr, flush=True)
    except OSError as error:
        if error.errno not in FULL:
            raise
        code = EXIT_DAMAGE
        place = error.filename or "the run folder"
        print(
            f"megagpt: {place}: {error.strerror}; the checkpoints that were saved are whole; make "
            "space and run the same command again to go on",
            file=sys.stderr,
            flush=True,
        )
    finally:
        leave(clean=code == EXIT_OK)
    return code


def train(run: str, overrides: Sequence[str], allow_changes: bool = False) -> int:
    """Trains one run file on this rank, from its environment's place among the ranks.

    Joins the process group, which the caller leaves.
    """
    config = load_run(run, overrides)
    ranks = discover(os.environ)
    layout = layout_of(config, ranks.world)
    ds_config = resolve(config, layout, read_ds_config(config.parallel.ds_config))
    prepare_environment(ranks, os.environ)
    if not config.parallel.compile:
        # Spares the import of the compiler, which takes longer than a small run's first steps.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    folder, minutes = Path(config.output), config.log.watchdog_minutes
    stop = StopRequest(config.checkpoint, os.environ)
    with stop, Watchdog(folder, ranks, minutes) as watchdog:
        join(ranks, config)
        trainer = None
        try:
            if ranks.rank == 0:
                make_run_folder(config)
            trainer = Trainer(config, layout, ranks, ds_config, watchdog)
            trainer.run(stop, allow_changes)
            if ranks.rank == 0:
                print(summary(config))
        finally:
            if trainer is not None:
                trainer.close()
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
