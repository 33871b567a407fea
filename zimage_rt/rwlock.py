"""A fair readers–writer lock: requests share it, a change of the weights takes it exclusively."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .errors import RequestError


class FairRWLock:
    """Many readers or one writer, in the order of arrival: a writer that waits holds up later readers."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._tickets = itertools.count()
        # Tickets that wait or run, the oldest first.
        self._readers: dict[int, None] = {}
        self._writers: dict[int, None] = {}
        self._own = threading.local()

    @contextmanager
    def read(self) -> Iterator[None]:
        """Share the lock; a thread that reads already may enter again."""
        if getattr(self._own, "reads", False):
            # No new ticket: a writer that waits for this thread would be waited for by it.
            yield
            return
        with self._hold(self._readers, lambda ticket: _first(self._writers, ticket) >= ticket):
            self._own.reads = True
            try:
                yield
            finally:
                self._own.reads = False

    @contextmanager
    def write(self, doing: str) -> Iterator[None]:
        """Hold the lock alone. Raises RequestError for a thread that reads: it would wait for itself."""
        if getattr(self._own, "reads", False):
            raise RequestError(f"{doing}: cannot be called while a request runs, as from its callback; call it after")
        everyone = (self._readers, self._writers)
        with self._hold(self._writers, lambda ticket: all(_first(kind, ticket) >= ticket for kind in everyone)):
            yield

    @contextmanager
    def _hold(self, kind: dict[int, None], may_run: Callable[[int], bool]) -> Iterator[None]:
        with self._condition:
            ticket = next(self._tickets)
            kind[ticket] = None
        try:
            with self._condition:
                self._condition.wait_for(lambda: may_run(ticket))
            yield
        finally:
            with self._condition:
                del kind[ticket]
                self._condition.notify_all()


def _first(tickets: dict[int, None], default: int) -> int:
    return next(iter(tickets), default)
