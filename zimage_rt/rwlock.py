"""A fair readers–writer lock: requests share it, changes of the weights hold it exclusively."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

from .errors import RequestError


class FairRWLock:
    """Many readers of one state, or one writer, in the order of arrival.

    A state is a value that concurrent readers must agree on, such as the LoRAs of a request. Readers of another state
    wait as writers do, and later arrivals wait behind them.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._tickets = itertools.count()
        # The state of every waiting or running ticket, the oldest first; a writer's state equals no other.
        self._states: dict[int, Hashable] = {}
        self._own = threading.local()

    @contextmanager
    def read(self, state: Hashable = None) -> Iterator[bool]:
        """Share the lock with readers of the same state; yields False if this thread held it already, else True.

        A thread that reads already re-enters with its own state, because a new ticket would wait behind a writer that
        waits for this thread. Raises RequestError if such a thread asks for another state.
        """
        held = getattr(self._own, "state", _NOTHING)
        if held is not _NOTHING:
            if state is not None and state != held:
                raise RequestError("loras: cannot change while a request runs, as from its callback; call it after")
            yield False
            return
        with self._hold(state):
            self._own.state = state
            try:
                yield True
            finally:
                self._own.state = _NOTHING

    @contextmanager
    def write(self, doing: str) -> Iterator[None]:
        """Hold the lock exclusively. Raises RequestError in a thread that reads, which would wait for itself."""
        if getattr(self._own, "state", _NOTHING) is not _NOTHING:
            raise RequestError(f"{doing}: cannot be called while a request runs, as from its callback; call it after")
        with self._hold(object()):
            yield

    @contextmanager
    def _hold(self, state: Hashable) -> Iterator[None]:
        with self._condition:
            ticket = next(self._tickets)
            self._states[ticket] = state
        try:
            with self._condition:
                self._condition.wait_for(lambda: self._is_first(ticket, state))
            yield
        finally:
            with self._condition:
                del self._states[ticket]
                self._condition.notify_all()

    def _is_first(self, ticket: int, state: Hashable) -> bool:
        """Whether every older ticket has the same state."""
        return all(its == state for other, its in self._states.items() if other < ticket)


_NOTHING = object()
