"""One thread that owns the model, and the requests that wait for it (L3).

A request's texts are made in the generator's batch beside those of others. Whoever asked reads what
they grow by from a queue of its event loop, and `cancel`s when nobody listens any more.
"""

import asyncio
import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from megagpt.serve.limits import ApiRefusal, Limits
from megagpt.use.generator import Continuation, Generator
from megagpt.use.pieces import Piece

log = logging.getLogger(__name__)

BROKEN = "the model failed while this text was made; the server's log says how"
"""What a request is told of an error that is none of its own."""
Growth = list[tuple[int, Piece, str]]
"""(number of a text in its request, what it has grown by, why it ended or "") of one step. The text
itself may be further by the time that this is read."""


class Ticket:
    """A request's texts, on their way."""

    def __init__(self, texts: Sequence[Continuation]) -> None:
        self.texts = texts
        self.grown: asyncio.Queue[Growth | None] = asyncio.Queue()
        """What the texts grow by; None: the model failed."""
        self._loop = asyncio.get_running_loop()

    def put(self, growth: Growth | None) -> None:
        """Hands over what a step has made; called by the model's thread."""
        # A loop that has closed has no readers.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.grown.put_nowait, growth)


class Scheduler:
    """Starts the model's thread; `submit` and `cancel` are called from the event loop."""

    def __init__(self, generator: Generator, limits: Limits) -> None:
        self.generator, self.limits = generator, limits
        self.started_at = time.time()
        self.requests = self.refused = self.cancelled = self.failed = 0
        self.steps = 0
        self._made = self._read = 0
        """Tokens of generators that are gone."""
        self._unfinished: dict[int, tuple[Ticket, int]] = {}
        """id of a text -> its request, its number there."""
        self._orders: deque[Callable[[], None]] = deque()
        self._woken = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    @property
    def load(self) -> int:
        """Texts that are unfinished, whether they wait or are made."""
        return len(self._unfinished)

    def submit(self, texts: Sequence[Continuation]) -> Ticket:
        """Takes the texts of a request. Raises ApiRefusal (429) when there is no room for them."""
        most = self.limits.concurrent + self.limits.queue
        if self.load + len(texts) > most:
            self.refused += 1
            raise ApiRefusal(
                f"the server is busy: {self.load} texts are being made or wait, and it takes "
                f"{most}; try again in a second",
                429,
                code="queue_full",
            )
        self.requests += 1
        ticket = Ticket(texts)
        for number, text in enumerate(texts):
            self._unfinished[id(text)] = ticket, number

        def add() -> None:
            for text in texts:
                if id(text) in self._unfinished:  # not cancelled meanwhile
                    self.generator.add(text)

        self._order(add)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Frees the rows of a request's unfinished texts, before the model's next step."""
        left = [text for text in ticket.texts if self._unfinished.pop(id(text), None)]
        self.cancelled += bool(left)

        def forget() -> None:
            for text in left:
                self.generator.cancel(text)

        self._order(forget)

    @contextmanager
    def made(self, texts: Sequence[Continuation]) -> Iterator[Ticket]:
        """A request's texts, freed at the end whatever became of them."""
        ticket = self.submit(texts)
        try:
            yield ticket
        finally:
            self.cancel(ticket)

    def close(self) -> None:
        """Ends the thread after its step."""
        self._closing = True
        self._order(lambda: None)
        self._thread.join()

    def _order(self, order: Callable[[], None]) -> None:
        with self._woken:
            self._orders.append(order)
            self._woken.notify()

    # --- the model's thread ----------------------------------------------------------------------

    def _work(self) -> None:
        while not self._closing:
            with self._woken:
                while not self._orders and not self.generator.busy:
                    self._woken.wait()
                orders, self._orders = self._orders, deque()
            try:
                for order in orders:
                    order()
                self._step()
            except Exception:  # whatever it is, the server goes on and the requests are told
                log.exception("the model failed")
                self._begin_anew()

    def _step(self) -> None:
        growth: dict[Ticket, Growth] = defaultdict(list)
        self.steps += 1
        for text, piece in self.generator.step():
            if found := self._unfinished.get(id(text)):
                ticket, number = found
                growth[ticket].append((number, piece, text.finish))
            if text.finish:
                self._unfinished.pop(id(text), None)
        for ticket, grown in growth.items():
            ticket.put(grown)

    def _begin_anew(self) -> None:
        """Fails every request, and gives the next ones a generator without a past."""
        self.failed += 1
        tickets = set()
        for text in list(self._unfinished):
            # One by one: a request that comes meanwhile is not forgotten, one that goes is gone.
            if found := self._unfinished.pop(text, None):
                tickets.add(found[0])
        self._made, self._read = self.made_tokens, self.read_tokens
        self.generator = self.generator.anew()
        # Last: who is told may ask again at once.
        for ticket in tickets:
            ticket.put(None)

    # --- figures ---------------------------------------------------------------------------------

    @property
    def made_tokens(self) -> int:
        """Tokens drawn since the start."""
        return self._made + self.generator.made_tokens

    @property
    def read_tokens(self) -> int:
        """Tokens of prompts read since the start."""
        return self._read + self.generator.read_tokens

    def figures(self) -> Iterator[tuple[str, str, str, float]]:
        """(name, kind, help, value) of each figure for Prometheus."""
        generator = self.generator
        yield "uptime_seconds", "gauge", "Seconds since the start.", time.time() - self.started_at
        yield "requests_total", "counter", "Requests taken.", self.requests
        yield "requests_refused_total", "counter", "Requests refused, queue full.", self.refused
        yield "requests_cancelled_total", "counter", "Requests whose client left.", self.cancelled
        yield "model_failures_total", "counter", "Steps of the model that failed.", self.failed
        yield "prompt_tokens_total", "counter", "Tokens of prompts read.", self.read_tokens
        yield "generated_tokens_total", "counter", "Tokens made.", self.made_tokens
        yield "steps_total", "counter", "Steps of the model.", self.steps
        yield "texts_running", "gauge", "Texts in the model's batch.", generator.texts
        yield "texts_unfinished", "gauge", "Texts in the batch or waiting.", self.load
