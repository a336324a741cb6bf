"""The ranks meet at a key-value store that rank 0 keeps at MASTER_ADDR:MASTER_PORT (L2).

No collective is needed there, so a rank that never comes is named instead of waited for without a
word, and what gloo or NCCL fail at can still be told. Values are what JSON can carry.
"""

import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from megagpt.cluster.agreement import TOLERATED, disagreements
from megagpt.cluster.interface import outward
from megagpt.cluster.ranks import Ranks
from megagpt.errors import EXIT_FAILURE, EXIT_USAGE, MegagptError, UsageError
from megagpt.files import write_file
from megagpt.log.metrics import spans

log = logging.getLogger(__name__)

TELL_S = 10.0
"""Seconds between two signs that a rank's work goes on."""
POLL_S = 0.5
"""Seconds between two looks at the others'."""


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
        store = _store(ranks, minutes)
        _check_run(store, ranks, run, minutes)
        self._store = PrefixStore(f"megagpt/{run}", store)
        self._works = 0

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
            code, problem, self.hosts, self.addresses = self.get("verdict", 120 * minutes)
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
                f"rank{'s' * (len(missing) > 1)} {spans(missing)} of {len(keys)} did not come "
                f"within {minutes:g} minutes; the others run on {', '.join(dict.fromkeys(hosts))}: "
                "look at what the launcher says of the missing host, and try to reach it by ssh"
            )
            return EXIT_FAILURE, problem, [], []
        said = [self.get(key) for key in keys]
        hosts, addresses, facts = (list(column) for column in zip(*said, strict=True))
        problems = disagreements(hosts, facts)
        for problem in [p for p in problems if p.startswith(TOLERATED)]:
            log.warning("%s", problem)
            problems.remove(problem)
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

    def begin_work(self) -> str:
        """A name for work that all ranks begin together."""
        self._works += 1
        return f"work {self._works}"

    def count(self, name: str, more: int = 0) -> int:
        """A number of all ranks, with `more` added. Raises MegagptError without rank 0."""
        try:
            return int(self._store.add(name, more))
        except RuntimeError:
            raise MegagptError(f"rank {self.ranks.rank}: rank 0 has ended") from None

    def share_folder(self, folder: Path, wait_s: float = 30.0) -> None:
        """Returns when every host has seen what rank 0 has just written into `folder`. All ranks
        call it, rank 0 once the folder is there.

        wait_s: for a network file system to show what is new. Raises UsageError that names hosts
        which do not see it.
        """
        rank, leaders = self.ranks.rank, [self.hosts.index(h) for h in dict.fromkeys(self.hosts)]
        if len(leaders) < 2:
            return
        path = folder / ".meeting"
        if rank == 0:
            token = secrets.token_hex(16)
            write_file(path, token)
            self.put("folder", token)
        # Rank 0 may wait for an earlier run to end, as long as that may take.
        token = self.get("folder", 86400.0)
        if rank in leaders:
            self.put(f"folder/{rank}", _unseen(path, token, wait_s))
        if rank == 0:
            seen = {self.hosts[r]: self.get(f"folder/{r}", 2 * wait_s + 60) for r in leaders}
            path.unlink(missing_ok=True)
            self.put("folder seen", [f"{host} ({why})" for host, why in seen.items() if why])
        if blind := self.get("folder seen", 2 * wait_s + 120):
            raise UsageError(
                f"output = {str(folder)!r}: what rank 0 on {self.hosts[0]} has written there is "
                f"not seen on {', '.join(blind[:4])}; all hosts must share the run folder: mount "
                "the same file system there, or give another place"
            )


class LongWork:
    """Work that may take some ranks hours longer than others. They wait outside of the collectives,
    whose time is limited, for as long as some rank says that it goes on. All ranks make one."""

    def __init__(self, meeting: Meeting, alive: Callable[[], None]) -> None:
        self._meeting, self._alive, self._name = meeting, alive, meeting.begin_work()
        self._told = time.monotonic()

    def alive(self) -> None:
        """This rank goes on; called as often as one likes."""
        self._alive()
        if time.monotonic() - self._told > TELL_S:
            self._told = time.monotonic()
            self._meeting.count(f"{self._name} goes on", 1)

    def wait(self) -> None:
        """Returns when all ranks have come here. Raises MegagptError without rank 0."""
        self._meeting.count(self._name, 1)
        seen = (0, 0)
        while seen[0] < self._meeting.ranks.world:
            now = (self._meeting.count(self._name), self._meeting.count(f"{self._name} goes on"))
            if now != seen:
                self._alive()
            if (seen := now)[0] < self._meeting.ranks.world:
                time.sleep(POLL_S)


def _unseen(path: Path, token: str, wait_s: float) -> str:
    """Why a file does not have the content that another host gave it; "" when it has."""
    until = time.monotonic() + wait_s
    while True:
        try:
            # Network file systems may show a new name only once the folder was listed anew.
            os.listdir(path.parent)
            why = "" if path.read_text() == token else "another file"
        except OSError as error:
            why = error.strerror or str(error)
        if not why or time.monotonic() > until:
            return why
        time.sleep(0.2)


def _check_run(store: Any, ranks: Ranks, run: str, minutes: float) -> None:
    """Raises MegagptError where another run meets at this store, which may hold the port."""
    key = "megagpt meets"
    if ranks.rank == 0:
        store.set(key, run)
        return
    try:
        store.wait([key], timedelta(minutes=minutes))
        other = store.get(key).decode()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise MegagptError(
            f"rank {ranks.rank}: rank 0 did not come to {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']} within {minutes:g} minutes ({reason})"
        ) from None
    if other != run:
        raise MegagptError(
            f"MASTER_PORT = {os.environ['MASTER_PORT']}: the run {other!r} meets there, not "
            f"{run!r}; choose another port"
        )


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
