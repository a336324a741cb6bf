"""What the ranks of a job tell each other through the store at which they met, without collectives.

The store needs nothing but a connection to rank 0, so reports come through where gloo or NCCL will
fail, and can say why.
"""

import json
import socket
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

from megagpt.check.doctor.compare import Clock, offset
from megagpt.cluster.meeting import meet
from megagpt.cluster.ranks import Ranks
from megagpt.errors import MegagptError

EXCHANGES = 3
"""Questions for the time to each host."""


class Meeting:
    """The ranks of a job, all there; every rank makes one."""

    def __init__(self, ranks: Ranks, wait_s: float) -> None:
        """Waits for all. Raises MegagptError that names the ranks which did not come in time."""
        self.ranks, self.wait_s = ranks, wait_s
        self._store = meet(ranks, {}, wait_s / 60)

    def put(self, name: str, value: Any) -> None:
        """Tells the others `value`, which JSON can carry."""
        self._store.set(f"doctor/{name}", json.dumps(value))

    def get(self, name: str, wait_s: float | None = None) -> Any:
        """What was put under this name. Raises MegagptError when it does not come in time."""
        key, wait_s = f"doctor/{name}", self.wait_s if wait_s is None else wait_s
        try:
            self._store.wait([key], timedelta(seconds=wait_s))
            return json.loads(self._store.get(key))
        except RuntimeError as error:
            raise MegagptError(
                f"rank {self.ranks.rank} on {socket.gethostname()} waited for {name}: "
                f"{str(error).strip().splitlines()[0]}"
            ) from None

    def there(self, name: str) -> bool:
        """Whether something was put under this name."""
        return bool(self._store.check([f"doctor/{name}"]))

    def from_first(self, name: str, value: Any, wait_s: float | None = None) -> Any:
        """Rank 0's value, on every rank."""
        if self.ranks.rank == 0:
            self.put(name, value)
        return self.get(name, wait_s)

    def gather(self, name: str, value: Any) -> list[Any]:
        """Every rank's value, by rank, on every rank."""
        self.put(f"{name} of rank {self.ranks.rank}", value)
        found = []
        if self.ranks.rank == 0:
            found = [self.get(f"{name} of rank {rank}") for rank in range(self.ranks.world)]
        return list(self.from_first(f"every {name}", found))

    def clocks(self, leaders: Mapping[int, str]) -> Iterator[Clock]:
        """On rank 0: how far each leader's clock is ahead. The leaders call tell_time()."""
        for rank, host in leaders.items():
            exchanges = []
            for turn in range(EXCHANGES):
                asked = time.time()
                self.put(f"time {turn} asked of {rank}", "")
                there = self.get(f"time {turn} of {rank}")
                exchanges.append((asked, float(there), time.time()))
            yield offset(host, exchanges)

    def tell_time(self, wait_s: float) -> None:
        """Answers rank 0's questions for the time; it asks one host after the other."""
        for turn in range(EXCHANGES):
            self.get(f"time {turn} asked of {self.ranks.rank}", wait_s)
            self.put(f"time {turn} of {self.ranks.rank}", time.time())
