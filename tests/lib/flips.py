"""A campaign of bit flips over every file that a run leaves: what is done about each of them?

    python -m tests.lib.flips --flips 4000 --starts 60 --seed 1 --output DIR

The run is that of tests/fixtures, trained on to its end. One bit is flipped at a time:

- in a checkpoint, which `verify` reads;
- in a folder of consolidated weights, which a model is opened from;
- in the journal, which a start compares with the checkpoint;
- in every other file of the run folder, beside which the last steps are then trained again.

A flip is found when the reader names the file; it is harmless when the run that goes on ends with
the same weights, bit for bit; otherwise it was believed. Prints a JSON object with the counts of
each file; exit code 1 when a flip was believed.
"""

import argparse
import json
import os
import random
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from megagpt.checkpoint import list_checkpoints, load_model, verify
from megagpt.checkpoint.export import consolidate, consolidated_state
from megagpt.checkpoint.journal import Journal, read_journal
from megagpt.checkpoint.record import read_record
from megagpt.cluster.ranks import Ranks
from megagpt.cluster.stop import StopRequest
from megagpt.config import RunConfig, load_run
from megagpt.errors import DamageError, MegagptError
from megagpt.loop import Trainer
from megagpt.plan.ds_config import read_ds_config, resolve
from megagpt.plan.layout import Layout
from tests.lib.distributed import ROOT, digest_of_weights, group_of_one

FIXTURE = ROOT / "tests" / "fixtures" / "before_redesign"
Tally = Counter[str]
"""tried, found, harmless, believed."""


def train_to_the_end(config: RunConfig) -> str:
    """Trains from wherever the run folder is, in this process; the digest of the last weights."""
    ds_config = resolve(config, Layout(), read_ds_config(config.parallel.ds_config))
    trainer = Trainer(config, Layout(), Ranks(), ds_config)
    try:
        trainer.run(StopRequest(config.checkpoint, {}), allow_changes=False)
    finally:
        trainer.close()
    return digest_of_weights(Path(config.output))


@dataclass
class Flips:
    """The campaign in a folder of its own, which is the working directory."""

    folder: Path
    draw: random.Random
    tallies: dict[str, Tally] = field(default_factory=lambda: defaultdict(Counter))

    def prepare(self) -> None:
        """A run that has ended, and what it was three steps before; its weights for others."""
        shutil.copytree(FIXTURE, self.folder, dirs_exist_ok=True)
        run = Path("run")
        for step in (20, 22):
            entries = (*read_journal(run).entries, (step, None))
            Journal(entries).write(run, reason=f"loss {step}")
        overrides = ["checkpoint.keep_last=9", "evaluate.samples=1", "evaluate.sample_tokens=8"]
        self.config = load_run("run.toml", overrides)
        self.expected = train_to_the_end(self.config)
        self.last = list_checkpoints(run)[-1]
        self.sealed = read_record(self.last).rollbacks
        assert len(self.sealed) == 2
        shutil.copytree(self.last, "checkpoint")
        consolidate(run, Path("consolidated"))
        shutil.rmtree(self.last)

    def flip(self, path: Path) -> bytes:
        """Flips one bit of a file; its content before."""
        whole = path.read_bytes()
        data = bytearray(whole)
        bit = self.draw.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        return whole

    def read(self, group: str, paths: Iterable[Path], count: int, reader: Callable) -> None:
        """`count` flips, each of a file drawn by its size, that `reader` should name."""
        files = sorted(paths)
        sizes = [path.stat().st_size for path in files]
        # Every file at least once, whatever it takes of the bytes.
        for path in [*files, *self.draw.choices(files, sizes, k=max(0, count - len(files)))]:
            whole = self.flip(path)
            problems = reader()
            path.write_bytes(whole)
            assert not problems or path.name in problems[0], (path, problems)
            self.count(f"{group}/{path.name}", "found" if problems else "believed")

    def count(self, name: str, outcome: str) -> None:
        self.tallies[name].update(["tried", outcome])

    def checkpoint(self, count: int) -> None:
        folder = Path("checkpoint")
        self.read("checkpoint", folder.iterdir(), count, lambda: verify(folder))

    def consolidated(self, count: int) -> None:
        folder = Path("consolidated")
        self.read("consolidated", folder.iterdir(), count, lambda: consolidated_state(folder)[0])
        self.read(
            "opened", folder.iterdir(), count // 50, lambda: refused(lambda: load_model(folder))
        )

    def journal(self, count: int) -> None:
        run = Path("run")
        self.read(
            "run",
            [run / "journal.jsonl"],
            count,
            lambda: refused(lambda: read_journal(run).agree(self.sealed, run)),
        )

    def starts(self, count: int) -> None:
        """Flips in the other files of the run folder, each before a start that trains on."""
        whole = Path("run")
        names = sorted(
            str(path.relative_to(whole))
            for path in whole.rglob("*")
            if path.is_file() and path.stat().st_size and path.name != "journal.jsonl"
        )
        names = [name for name in names if not name.startswith("checkpoints/step_")]
        for number in range(count):
            name = names[number % len(names)]
            saved = Path("saved")
            shutil.copytree(whole, saved)
            self.flip(whole / name)
            try:
                same = train_to_the_end(self.config) == self.expected
                outcome = "harmless" if same else "believed"
            except MegagptError as error:
                assert Path(name).name in str(error), (name, error)
                outcome = "found"
            shutil.rmtree(whole)
            saved.rename(whole)
            self.count(f"run/{name}", outcome)


def refused(action: Callable[[], object]) -> list[str]:
    """What kept an action from believing what it read; empty when it did."""
    try:
        action()
    except DamageError as error:
        return [str(error)]
    return []


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--flips", type=int, default=4000, help="of each kind that is only read")
    parser.add_argument("--starts", type=int, default=60, help="before which the run goes on")
    parser.add_argument("--seed", type=int, default=1, help="of the draws (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="new folder for all files")
    args = parser.parse_args()
    args.output.mkdir(parents=True)
    os.chdir(args.output)
    flips = Flips(Path.cwd(), random.Random(args.seed))
    with group_of_one():
        flips.prepare()
        flips.checkpoint(args.flips)
        flips.consolidated(args.flips)
        flips.journal(args.flips)
        flips.starts(args.starts)
    total: Tally = Counter()
    for tally in flips.tallies.values():
        total += tally
    print(json.dumps({"all": total, **flips.tallies}, indent=1))
    return 1 if total["believed"] else 0


if __name__ == "__main__":
    sys.exit(main())
