"""What makes texts for a command: on one process, or on ranks that share the model out (L3).

    deepspeed --num_gpus 4 --module megagpt serve RUN_DIR --split

Of several ranks the first one takes the texts. All have the same generator and make the same steps,
since each holds a part of every matrix. Before a step the first rank tells the others which texts
came and which were cancelled. While there is nothing to make, the others wait for a key of the
ranks' store, which has no time limit as a collective has.
"""

import argparse
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

import tiktoken
import torch
import torch.distributed as dist

from megagpt.model import GPT
from megagpt.use.generator import Continuation, Generator
from megagpt.use.loading import DTYPES, load_placed
from megagpt.use.pieces import Piece

log = logging.getLogger(__name__)

LOOK = timedelta(seconds=60)
"""How long a rank waits for the key before it looks whether the store is still there."""


@contextmanager
def placed_generator(
    args: argparse.Namespace, rows: int, alone: bool = False
) -> Iterator[tuple[Generator | None, dict[str, Any]]]:
    """(what makes `rows` texts at a time, facts of the model), where RUN_DIR, --dtype, --device and
    --split say; alone: as Generator's. Of several ranks the first one has it, the others do what it
    does and get None when it has done.

    Raises what load_placed and load_shared raise.
    """
    if not args.split:
        stored = 1 if alone else rows
        model, encoding, facts = load_placed(args.folder, args.dtype, args.device, stored)
        yield Generator(model, encoding, rows, alone), facts
        return
    from megagpt.checkpoint.sharing import leave, load_shared

    model, encoding, facts, rank = load_shared(args.folder, getattr(torch, DTYPES[args.dtype]))
    if rank:
        follow(Generator(model, encoding, rows, alone))
        yield None, facts
        leave()
        return
    leading = LeadingGenerator(model, encoding, rows, alone)
    try:
        yield leading, facts
    finally:
        # After an error, too: the others would wait for ever.
        leading.dismiss()
        leave()


class LeadingGenerator(Generator):
    """The first rank's: what is done to it, the other ranks' do as well."""

    def __init__(self, model: GPT, encoding: tiktoken.Encoding, rows: int, alone: bool) -> None:
        super().__init__(model, encoding, rows, alone)
        self._orders: list[tuple[Any, ...]] = []
        self._awake = False
        """Whether the others wait for the next step's orders."""
        self._calls = 0

    def add(self, text: Continuation) -> None:
        """As Generator's."""
        super().add(text)
        self._orders.append((id(text), text.prompt, text.options, text.number))

    def cancel(self, text: Continuation) -> None:
        """As Generator's."""
        super().cancel(text)
        self._orders.append((id(text),))
        if self._awake and not self.busy:
            self._tell(step=False)

    def step(self) -> list[tuple[Continuation, Piece]]:
        """As Generator's."""
        if not self.busy:  # nothing that the others would be needed for
            return super().step()
        self._tell(step=True)
        grown = super().step()
        self._awake = self.busy
        return grown

    def anew(self) -> NoReturn:
        """There is none: the ranks no longer agree on what has been done."""
        log.error("the model failed on one of several ranks; start the server again")
        os._exit(1)  # and the launcher ends them all

    def dismiss(self) -> None:
        """Ends the others' `follow`."""
        self._tell(step=None)

    def _tell(self, step: bool | None) -> None:
        if not self._awake:
            _store().set(_key(self._calls), "")
            self._calls += 1
        self._awake = bool(step)
        dist.broadcast_object_list([(step, self._orders)], src=0)
        self._orders = []


def follow(generator: Generator) -> None:
    """Does what the first rank's generator does, until that dismisses it."""
    for number in (signal.SIGTERM, signal.SIGINT):
        # A launcher signals all ranks; it is the first one that finishes what is there.
        signal.signal(number, signal.SIG_IGN)
    texts: dict[int, Continuation] = {}
    calls = 0
    while True:
        if not generator.busy:
            _wait(_key(calls))
            calls += 1
        told: list[Any] = [None]
        dist.broadcast_object_list(told, src=0)
        step, orders = told[0]
        if step is None:
            return
        for name, *made in orders:
            if made:
                texts[name] = Continuation(*made)
                generator.add(texts[name])
            elif name in texts:
                generator.cancel(texts.pop(name))
        if step:
            generator.step()
            texts = {name: text for name, text in texts.items() if not text.finish}


def _key(number: int) -> str:
    return f"megagpt-texts-{number}"


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _wait(key: str) -> None:
    while True:
        try:
            return _store().wait([key], LOOK)
        except dist.DistStoreError:  # nobody has asked for anything meanwhile
            continue
