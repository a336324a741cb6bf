"""The ranks meet at a key-value store that rank 0 keeps at MASTER_ADDR:MASTER_PORT (L2).

No collective is needed there, so a rank that never comes is named instead of waited for without a
word, and what gloo or NCCL fail at can still be told. Values are what JSON can carry.
"""

import json
import os
import socket
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from megagpt.cluster.agreement import disagreements
from megagpt.cluster.interface import outward
from megagpt.cluster.ranks import Ranks
from megagpt.errors import EXIT_FAILURE, EXIT_USAGE, MegagptError, UsageError


class Meeting:
    """This rank at the store of its run: connected -> agreed, after which all ranks are there."""

    def __init__(self, ranks: Ranks, minutes: float, run: str = "") -> None:
        """Connects. Raises MegagptError when rank 0 does not answer within `minutes`, or when it
        cannot listen.

        run: the run's name. Where another run holds the port, the ranks that are led to its store
        must not be taken for its own.
        """
        from torch.distributed import PrefixStore

        self.ranks = ranks
        self.hosts: list[str] = []
        """Host name of every rank, by rank; empty before they agreed."""
        self.addresses: list[str] = []
        """Address of every rank's host on its way to rank 0, by rank; "" where none is known."""
        self._store = PrefixStore(f"megagpt/{run}", _store(ranks, minutes))

    def agree(self, facts: Mapping[str, str], minutes: float) -> None:
        """Waits for all ranks, and compares the facts of their hosts. All ranks call it.

        Raises UsageError that names what differs, MegagptError that names the ranks which did not
        come within `minutes`.
        """
        own = [socket.gethostname(), outward(os.environ["MASTER_ADDR"]), dict(facts)]
        self.put(f"here/{self.ranks.rank}", own)
        if self.ranks.rank == 0:
            self.put("verdict", self._verdict(minutes))
        try:
            # Rank 0 may have come just in time to wait `minutes` itself.
            verdict = self.get("verdict", 120 * minutes)
            code, problem, self.hosts, self.addresses = verdict
        except MegagptError:
            code, problem = EXIT_FAILURE, "rank 0 ended before all ranks had come"
            problem = f"rank {self.ranks.rank}: {problem}"
        if problem:
            raise UsageError(problem) if code == EXIT_USAGE else MegagptError(problem)

    def _verdict(self, minutes: float) -> tuple[int, str, list[str], list[str]]:
        """On rank 0: (exit code, problem, hosts, addresses by rank); 0 and "" when all agree."""
        keys = [f"here/{rank}" for rank in range(self.ranks.world)]
        try:
            self._store.wait(keys, timedelta(minutes=minutes))
        except RuntimeError:
            missing = [rank for rank, key in enumerate(keys) if not self.has(key)]
            hosts = [self.get(key)[0] for rank, key in enumerate(keys) if rank not in missing]
            problem = (
                f"{_spans(missing)} of {len(keys)} did not come within {minutes:g} minutes; the "
                f"others run on {', '.join(dict.fromkeys(hosts))}: look at what the launcher says "
                "of the missing host, and try to reach it by ssh"
            )
            return EXIT_FAILURE, problem, [], []
        said = [self.get(key) for key in keys]
        hosts, addresses, facts = (list(column) for column in zip(*said, strict=True))
        problems = disagreements(hosts, facts)
        return (EXIT_USAGE if problems else 0), "\n".join(problems), hosts, addresses

    def put(self, name: str, value: Any) -> None:
        """Tells the other ranks a value under a name."""
        self._store.set(name, json.dumps(value))

    def has(self, name: str) -> bool:
        """Whether a rank has told a value under this name. Raises RuntimeError without rank 0."""
        return bool(self._store.check([name]))

    def get(self, name: str, wait_s: float = 60.0) -> Any:
        """What a rank told under this name. Raises MegagptError when it does not come in time."""
        try:
            self._store.wait([name], timedelta(seconds=wait_s))
            return json.loads(self._store.get(name))
        except RuntimeError as error:
            raise MegagptError(
                f"rank {self.ranks.rank} on {socket.gethostname()} waited for {name}: "
                f"{str(error).strip().splitlines()[0]}"
            ) from None

    def first(self, name: str) -> bool:
        """Whether this rank is the first that calls this with this name."""
        try:
            return bool(self._store.add(name, 1) == 1)
        except RuntimeError:
            # The rank that kept the store is gone; better said twice than never.
            return True

    def all_call(self, name: str, wait_s: float) -> bool:
        """Whether every rank calls this within `wait_s` seconds."""
        try:
            self.put(f"{name}/{self.ranks.rank}", "")
            keys = [f"{name}/{rank}" for rank in range(self.ranks.world)]
            self._store.wait(keys, timedelta(seconds=wait_s))
        except RuntimeError:
            return False
        return True


def _store(ranks: Ranks, minutes: float) -> Any:
    """The store, kept by rank 0, or by torchrun's own process on that host."""
    from torch.distributed import TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    keeps = ranks.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        # multi_tenant: torch takes the same store for the process group.
        return TCPStore(
            address,
            port,
            is_master=keeps,
            timeout=timedelta(minutes=minutes),
            wait_for_workers=False,
            multi_tenant=keeps,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        if keeps:
            raise MegagptError(
                f"MASTER_PORT = {port}: rank 0 cannot listen there on {socket.gethostname()}; "
                f"another run may hold the port, so choose another ({reason})"
            ) from None
        raise MegagptError(
            f"rank {ranks.rank} on {socket.gethostname()}: rank 0 did not answer at "
            f"{address}:{port} within {minutes:g} minutes; see that MASTER_ADDR is a name of its "
            f"host that every host can reach, and whether it has started ({reason})"
        ) from None


def _spans(numbers: Sequence[int]) -> str:
    """rank 3, or ranks 1-2, 5: ascending numbers, neighbours drawn together."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    text = ", ".join(f"{a}-{b}" if a < b else str(a) for a, b in spans)
    return f"rank{'s' if len(numbers) > 1 else ''} {text}"
