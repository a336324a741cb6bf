"""What a start and a save ask of the file system and of the network, counted on many ranks.

    python benchmarks/scale.py --ranks 8 64 1024 > table.md

A rank is a thread; all ranks run megagpt's own code in one process. What they open, list, remove
and look at is counted where Python asks the system for it (audit events; os.stat and os.lstat), the
requests to the meeting's store where they are made. Their collectives are memory that the threads
share, counted as the bytes that a rank sends and receives: all_gather_object and gather_object send
as many bytes of each rank as the longest value has. What threads ask that a rank starts is its own.
"""

import argparse
import dataclasses
import itertools
import math
import os
import pickle
import socket
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from megagpt.checkpoint import CheckpointRecord, Saver, resume
from megagpt.checkpoint.load import shapes_of
from megagpt.cluster.meeting import Meeting
from megagpt.cluster.ranks import Ranks
from megagpt.config import RunConfig, load_run
from megagpt.corpus.manifest import new_manifest, write_manifest
from megagpt.corpus.shards import ShardWriter
from megagpt.engine.slices import OptimizerState, Slice, TensorShare
from megagpt.order.loader import training_loader
from megagpt.run.inputs import check_data
from megagpt.tokenizer import end_of_document, load_tokenizer

RUN = """
output = "{root}/run"
[model]
family = "gpt2"
n_layer = {layers}
n_head = 2
d_model = 16
n_ctx = 32
vocab_size = 257
[data]
train = [{{ path = "{root}/corpus" }}]
[schedule]
peak_lr = 1e-3
batch_tokens = 512
total_tokens = 20480
warmup_tokens = 512
decay_tokens = 20480
"""
STACK = 512 << 10
"""Bytes of a thread's stack."""

counted: dict[str, Counter[int]] = {}
"""What -> how often, by rank."""
rank_of: dict[int, int] = {}
"""Thread -> rank."""


def count(what: str, more: int = 1) -> None:
    """Counts for the rank of this thread."""
    rank = rank_of.get(threading.get_ident())
    if rank is not None:
        counted.setdefault(what, Counter())[rank] += more


def asking(real: Callable[..., Any]) -> Callable[..., Any]:
    """os.stat or os.lstat, counted."""

    def asked(*args: Any, **how: Any) -> Any:
        count("stats")
        return real(*args, **how)

    return asked


def listen() -> None:
    """From here on what threads of ranks ask of the file system is counted."""

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            count("opens")
        elif event in ("os.listdir", "os.scandir"):
            count("listings")
        elif event == "os.remove":
            count("removals")

    sys.addaudithook(hear)
    os.stat, os.lstat = asking(os.stat), asking(os.lstat)  # type: ignore[assignment]
    begin = threading.Thread.run

    def run(thread: threading.Thread) -> None:
        rank_of[threading.get_ident()] = rank_of.get(getattr(thread, "parent", 0), -1)
        try:
            begin(thread)
        finally:
            rank_of.pop(threading.get_ident(), None)

    start = threading.Thread.start

    def started(thread: threading.Thread) -> None:
        thread.parent = threading.get_ident()  # type: ignore[attr-defined]
        if thread.parent in rank_of:  # type: ignore[attr-defined]
            thread.run = lambda: run(thread)  # type: ignore[method-assign]
        start(thread)

    threading.Thread.start = started  # type: ignore[method-assign]


class Group:
    """Memory that the threads of all ranks share.

    walked: the ranks that have a thread, () for all; every other one says what its like says.
    """

    def __init__(self, world: int, walked: Sequence[int] = ()) -> None:
        self.world, self.walked = world, walked or range(world)
        self.like = [like(rank, self.walked) for rank in range(world)]
        self.values: list[Any] = [None] * world
        self.barrier = threading.Barrier(len(self.walked))


def like(rank: int, walked: Sequence[int]) -> int:
    """The walked rank that does what this one does: itself, the first of another host of eight
    ranks, any other one."""
    if rank in walked:
        return rank
    same = [one for one in walked if one and (one % 8 == 0) == (rank % 8 == 0)]
    return (same or walked)[-1]


class Threads:
    """An engine whose ranks are threads: what checkpoints and the check of the data ask of one."""

    device = torch.device("cpu")
    masked = False

    def __init__(self, group: Group, rank: int, parts: Sequence[Slice]) -> None:
        self.group, self.parts = group, parts
        self.ranks = Ranks(rank=rank, world=group.world)
        self.read = 0

    def _together(self, value: Any) -> list[Any]:
        """The values of all ranks, as they were when all had given theirs."""
        self.group.values[self.ranks.rank] = value
        self.group.barrier.wait()
        values = [self.group.values[rank] for rank in self.group.like]
        self.group.barrier.wait()
        return values

    def _counted(self, size: int) -> None:
        count("messages")
        count("bytes", size)

    def gather(self, value: Any) -> list[Any]:
        """all_gather_object."""
        longest = max(self._together(len(pickle.dumps(value))))
        self._counted(longest * self.group.world)
        return self._together(value)

    def collect(self, value: Any) -> list[Any]:
        """gather_object to rank 0."""
        longest = max(self._together(len(pickle.dumps(value))))
        self._counted(longest * (1 if self.ranks.rank else self.group.world))
        values = self._together(value)
        return [] if self.ranks.rank else values

    def first(self, value: Any) -> Any:
        """broadcast_object_list."""
        size = self._together(0 if self.ranks.rank else len(pickle.dumps(value)))[0]
        self._counted(size)
        return self._together(value)[0]

    def by_first(self, action: Callable[[], Any]) -> Any:
        """As Engine's; what fails here ends the benchmark."""
        return self.first(None if self.ranks.rank else action())

    def total(self, values: Sequence[float]) -> list[float]:
        """all_reduce."""
        self._counted(8 * len(values))
        return [math.fsum(column) for column in zip(*self._together(values), strict=True)]

    def barrier(self) -> None:
        """All have come."""
        count("messages")
        self.group.barrier.wait()

    def slices(self) -> Iterator[Slice]:
        """This rank's."""
        yield from self.parts

    def restore(self, state: OptimizerState) -> None:
        """What was loaded is all there is."""


class Store:
    """The meeting's store, its requests counted."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        def asked(*args: Any) -> Any:
            count("requests")
            answer = getattr(self._store, name)(*args)
            count("bytes", len(pickle.dumps((args, answer if name == "get" else None))))
            return answer

        return asked


def cut(config: RunConfig, world: int, zero3: bool) -> list[list[Slice]]:
    """The slices of each rank, of zeros: one stretch of all parameters (ZeRO-1), or one of each
    (ZeRO-3)."""
    shapes = shapes_of(config.model)
    held: list[list[Slice]] = [[] for _ in range(world)]
    total = sum(map(math.prod, shapes.values()))
    done = 0
    for name, shape in shapes.items():
        numel = math.prod(shape)
        part = -(-numel // world) if zero3 else -(-total // world)
        start = 0
        while start < numel:
            rank = start // part if zero3 else (done + start) // part
            end = min(numel, (rank + 1) * part - (0 if zero3 else done))
            zeros = torch.zeros(end - start)
            place = {"name": name, "shape": shape, "split": TensorShare(), "start": start}
            how = {"read": lambda key, zeros=zeros: zeros, "write": lambda key, value: None}
            held[rank].append(Slice(**place, **how, numel=end - start, owned=True))
            start = end
        done += numel
    return held


def on_all(
    world: int, work: Callable[[int], None], walked: Sequence[int] = ()
) -> dict[str, tuple[float, int]]:
    """Runs `work` on a thread a rank; what -> (mean of a rank, most of a rank).

    walked: see Group; a rank that has no thread counts what its like does.
    """
    counted.clear()

    def body(rank: int) -> None:
        rank_of[threading.get_ident()] = rank
        try:
            work(rank)
        except BaseException as error:
            os._exit(print(f"rank {rank}: {error!r}", file=sys.stderr) or 1)
        finally:
            rank_of.pop(threading.get_ident(), None)

    threads = [threading.Thread(target=body, args=(rank,)) for rank in walked or range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    likes = [like(rank, walked or range(world)) for rank in range(world)]
    return {
        what: (sum(by[rank] for rank in likes) / world, max(by.values()))
        for what, by in counted.items()
    }


def meeting(world: int) -> Callable[[int], None]:
    """All ranks meet, eight of them on a host."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    kept = []

    def work(rank: int) -> None:
        made = Meeting(Ranks(rank=rank, world=world), 5.0, "run")
        kept.append(made)
        made._store = Store(made._store)
        made.agree({"code": "sha256 0123456789ab"} if rank % 8 == 0 else {}, 5.0)

    return work


def corpus(root: Path, shards: int) -> None:
    """A corpus of `shards` small shards."""
    folder, encoding = root / "corpus", load_tokenizer("bytes")
    folder.mkdir()
    writer = ShardWriter(folder, encoding.n_vocab, name="web", shard_tokens=40)
    for number in range(shards):
        document = np.full(40, number % 256)
        document[0], document[-1] = number // 256, end_of_document(encoding)
        writer.add(document, np.array([40]))
    write_manifest(new_manifest(folder, "bytes", encoding, writer.close()))


def record() -> CheckpointRecord:
    """A state to save."""
    ones: dict[str, Any] = dict.fromkeys(("step", "samples", "seed", "updates"), 1)
    more: dict[str, Any] = dict.fromkeys(("loss_scale", "layout", "versions"), {})
    more |= {"skipped_steps": 0, "milestone": False, "files": (), "tokens": 512}
    return CheckpointRecord(**ones, **more, data={"fingerprint": "", "vocabulary": ""})


def rows(
    root: Path, world: int, zero3: bool, shards: int, layers: int, walked: Sequence[int] = ()
) -> Iterator[tuple[str, dict[str, tuple[float, int]]]]:
    """(what was done, its counts)."""
    (root / "run.toml").write_text(RUN.format(root=root, layers=layers))
    config = load_run(root / "run.toml")
    corpus(root, shards)
    yield "meet", on_all(world, meeting(world))
    held, group = cut(config, world, zero3), Group(world)
    engines = [Threads(group, rank, held[rank]) for rank in range(world)]
    # Ranks that compare and load say nothing of their own to each other; each saves its own file.
    few = Group(world, walked)
    walking = [Threads(few, rank, held[rank]) for rank in range(world)]
    run = Path(config.output)
    run.mkdir()
    work_left = SimpleNamespace(alive=lambda: None, wait=lambda: None)

    def data(rank: int) -> None:
        try:
            loader = training_loader(config, False)  # type: ignore[call-arg]
        except TypeError:
            loader = training_loader(config)  # before ranks shared it out
        check_data([loader], run, walking[rank], work_left)  # type: ignore[arg-type]
        loader.close()

    yield "compare the data, first start", on_all(world, data, walked)
    yield "compare the data, later starts", on_all(world, data, walked)
    state = record()
    savers = [Saver(run, config, engine) for engine in engines]  # type: ignore[arg-type]

    steps = itertools.count(1)

    def save(step: int) -> dict[str, tuple[float, int]]:
        def work(rank: int) -> None:
            savers[rank].begin(dataclasses.replace(state, step=step, updates=step))
            savers[rank].finish()
            getattr(savers[rank], "settle", lambda: None)()  # a thread removes what is retired

        return on_all(world, work)

    yield "save", save(next(steps))
    for _ in range(config.checkpoint.keep_last - 1):
        save(next(steps))
    yield "save, and retire one", save(next(steps))

    def load(rank: int) -> None:
        assert resume(run, config, walking[rank], lambda n: ("",))  # type: ignore[arg-type]

    yield "resume", on_all(world, load, walked)


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description="Counts what ranks ask for.")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 1024])
    parser.add_argument("--shards", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=96)
    parser.add_argument("--zero3", action="store_true", help="cut as ZeRO-3 does, not as ZeRO-1")
    how = "ranks that compare the data and resume, for all; others count as their like"
    parser.add_argument("--walked", type=int, nargs="*", default=[], metavar="RANK", help=how)
    args = parser.parse_args()
    threading.stack_size(STACK)
    sys.setswitchinterval(1.0)  # a thousand threads that ask for the lock every 5 ms hold up all
    listen()
    keys = ("opens", "stats", "listings", "removals", "requests", "messages", "bytes")
    print(f"| ranks | what | {' | '.join(keys)} |\n|{'---|' * (len(keys) + 2)}")
    for world in args.ranks:
        with tempfile.TemporaryDirectory() as folder:
            walked = [rank for rank in args.walked if rank < world]
            options = (args.zero3, args.shards, args.layers, walked)
            for what, found in rows(Path(folder), world, *options):
                cells = [_cell(*found.get(key, (0, 0))) for key in keys]
                print(f"| {world} | {what} | {' | '.join(cells)} |", flush=True)


def _cell(mean: float, most: int) -> str:
    """The mean of a rank, and the most of one where that is another number."""
    shown = f"{mean:,.1f}".removesuffix(".0")
    return shown if shown == f"{most:,}" else f"{shown} ({most:,})"


if __name__ == "__main__":
    main()
