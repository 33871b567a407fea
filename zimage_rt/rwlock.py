"""Who may run beside whom: requests run together, a change of the weights runs alone."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .errors import RequestError


class Turns:
    """A lock that many threads may hold together, or one alone, in the order they came: nobody waits for ever."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._tickets = itertools.count()
        # Of all that wait or run, the oldest first.
        self._together: dict[int, None] = {}
        self._alone: dict[int, None] = {}
        self._own = threading.local()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run beside others; may be entered again by a thread that is inside."""
        if getattr(self._own, "inside", False):
            # Without a new turn: who waits to be alone waits for this thread.
            yield
            return
        with self._turn(self._together, lambda ticket: _first(self._alone, ticket) >= ticket):
            self._own.inside = True
            try:
                yield
            finally:
                self._own.inside = False

    @contextmanager
    def alone(self, doing: str) -> Iterator[None]:
        """Run when nobody else does. Raises RequestError inside `together()`: it would wait for itself."""
        if getattr(self._own, "inside", False):
            raise RequestError(f"{doing}: cannot be called while a request runs, as from its callback; call it after")
        everyone = (self._together, self._alone)
        with self._turn(self._alone, lambda ticket: all(_first(kind, ticket) >= ticket for kind in everyone)):
            yield

    @contextmanager
    def _turn(self, kind: dict[int, None], may_run: Callable[[int], bool]) -> Iterator[None]:
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


def _first(kind: dict[int, None], default: int) -> int:
    return next(iter(kind), default)
