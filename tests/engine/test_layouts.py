"""A run saved under one layout goes on under any other at the same point of the same curve."""

import json
import sys
from pathlib import Path

import pytest

from megagpt.checkpoint import list_checkpoints, load_model
from megagpt.checkpoint.record import read_record
from megagpt.checkpoint.slice_file import SliceReader
from megagpt.cluster.ranks import Ranks
from megagpt.plan import layout as layout_module
from tests.lib.corpus import run_file
from tests.lib.distributed import free_port, group_of_one, run_together, steps
from tests.lib.reshape import train

RUN = {
    "schedule": {
        "total_tokens": 12_288,
        "warmup_tokens": 1024,
        "peak_lr": 3e-3,
        "batch_tokens": 512,
        "ramp_start_tokens": 256,
        "ramp_tokens": 2048,
    },
    "checkpoint": {"every_tokens": 2048, "keep_last": 100},
    "evaluate": {"every_tokens": 0, "batches": 1},
    "log": {"tensorboard": False},
}
TOLERANCE = 1e-5
"""Relative, of the loss in fp32."""

Layout = tuple[int, str, int, int]
"""(ranks, ds_config, pipeline, tensor)"""

PLAIN: list[Layout] = [(n, f"zero{z}", 1, 1) for n in (1, 2) for z in range(4)]
SPLIT: list[Layout] = [
    (2, "pipeline", 2, 1),
    (2, "pipeline", 1, 2),
    (4, "pipeline", 2, 1),
    (4, "pipeline", 2, 2),
]


MICRO_BATCH = {"zero0": 1, "zero1": 8, "zero2": 3, "zero3": 2, "pipeline": 4}
"""Of each ds_config, at most: the ramp's steps are cut differently before and after a reshape."""


def name(layout: Layout) -> str:
    return "-".join(map(str, layout))


class Reshaping:
    """Runs of one run file under many layouts below one folder."""

    def __init__(self, root: Path) -> None:
        self.root, self.file = root, run_file(root, **RUN)

    def run(self, hops: list[tuple[str, Path, Layout]]) -> None:
        """Trains each (source checkpoint, output, layout), those of one split in one process.

        DeepSpeed keeps the groups of a pipeline or tensor split beyond the engine they were for.
        """
        for split in sorted({(n, p, t) for _, _, (n, _, p, t) in hops}):
            ranks = split[0]
            plan = [
                (source, str(output), *layout[1:], f"parallel.micro_batch={MICRO_BATCH[layout[1]]}")
                for source, output, layout in hops
                if (layout[0], *layout[2:]) == split
            ]
            place = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
            port = f"--master-port={free_port()}"
            script = ["-m", "tests.lib.reshape", str(self.file), json.dumps(plan)]
            done = run_together([sys.executable, *place, port, *script], timeout_s=1800)
            assert done.returncode == 0, done.stderr

    def fresh(self, layouts: list[Layout]) -> None:
        self.run([("", self.root / name(one), one) for one in layouts])

    def middle(self, run: str, tokens: int) -> str:
        """A run's checkpoint after so many tokens, with at least ten steps to come."""
        folders = list_checkpoints(self.root / run)
        return str(next(f for f in folders if read_record(f).tokens == tokens))

    def resume(self, pairs: list[tuple[str, Layout]], tokens: int = 4096) -> list[str]:
        """Goes on with each (run, layout) from that run's checkpoint; the names of the new runs."""
        names = [f"{run}--{name(layout)}" for run, layout in pairs]
        hops = [
            (self.middle(run, tokens), self.root / new, layout)
            for new, (run, layout) in zip(names, pairs, strict=True)
        ]
        self.run(hops)
        return names

    def check(self, runs: list[str], reference: Layout) -> float:
        """The largest relative difference of a loss after a reshape; each within TOLERANCE."""
        expected = {r["step"]: r["loss"] for r in steps(self.root / name(reference))}
        worst = 0.0
        for run in runs:
            found = resumed_steps(self.root / run)
            assert len(found) >= 10 and max(found) == max(expected), (run, sorted(found))
            for step, loss in found.items():
                difference = abs(loss - expected[step]) / expected[step]
                assert difference < TOLERANCE, (run, step, loss, expected[step])
                worst = max(worst, difference)
        return worst


def resumed_steps(run: Path) -> dict[int, float]:
    """step -> loss of a run that began in the middle."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_zero_3_to_zero_1_and_back(tmp_path):
    runs = Reshaping(tmp_path)
    one, two = PLAIN[:4], PLAIN[4:]
    runs.fresh([one[1]])
    there = runs.resume([(name(one[1]), two[3])])
    runs.check([*there, *runs.resume([(there[0], one[1])], tokens=6144)], one[1])


@pytest.mark.slow
def test_zero_to_zero_over_one_and_two_ranks(tmp_path):
    # One rank to two and back to one; every stage is left and entered.
    runs = Reshaping(tmp_path)
    one, two = PLAIN[:4], PLAIN[4:]
    runs.fresh([one[0], one[3]])
    there = runs.resume([(name(one[0]), two[1]), (name(one[3]), two[2]), (name(one[0]), two[3])])
    back = runs.resume([(there[0], one[3]), (there[1], one[1]), (there[2], one[0])], tokens=6144)
    runs.check([*there, *back], one[0])


def test_a_bf16_checkpoint_without_padding_opens_in_the_padded_model_and_back(
    tmp_path, monkeypatch
):
    """As it was saved before vocabularies were padded for tensor cores: 257 rows, then 384."""
    file = run_file(tmp_path, **RUN)
    shapes, runs = {}, {}
    hops = [("old", 1, ""), ("new", 128, "old"), ("again", 1, "new")]
    with group_of_one():
        for own, rows, before in hops:
            monkeypatch.setattr(layout_module, "ROW_MULTIPLE", rows)
            at = {"old": 4096, "new": 6144}.get(before)
            source = next((f for f, saved in runs.get(before, []) if saved.tokens == at), "")
            assert bool(source) == bool(before)
            words = ("parallel.dtype=bf16", "parallel.micro_batch=8", "schedule.total_tokens=8192")
            train(file, Ranks(), str(source), str(tmp_path / own), *words)
            folders = list_checkpoints(tmp_path / own)
            runs[own] = [(f, read_record(f)) for f in folders]
            shapes[own] = tuple(SliceReader(folders[-1]).full("wte.weight").shape)
    assert shapes == {"old": (257, 32), "new": (384, 32), "again": (257, 32)}
    expected = {r["step"]: r["loss"] for r in steps(tmp_path / "old")}
    for own in ("new", "again"):
        found = resumed_steps(tmp_path / own)
        assert len(found) >= 4 and max(found) == max(expected)
        for step, loss in found.items():
            assert loss == pytest.approx(expected[step], rel=5e-3), (own, step)
        # What is used of it is the vocabulary alone.
        assert load_model(tmp_path / own)[0].wte.weight.shape == (257, 32)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_whole_matrix(tmp_path):
    runs = Reshaping(tmp_path)
    layouts = [*PLAIN, *SPLIT]
    runs.fresh(layouts)
    new = runs.resume([(name(a), b) for a in layouts for b in layouts])
    worst = runs.check(new, PLAIN[0])
    print(f"{len(new)} reshapes, largest relative difference of a loss {worst:.1e}")
