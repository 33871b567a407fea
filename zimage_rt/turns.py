"""Who may run beside whom: requests run together, a change of the weights runs alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import RequestError


class Turns:
    """A lock that many threads may hold together, or one alone. One that waits to be alone goes before new ones."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._together = 0
        self._alone = False
        self._waiting = 0
        self._own = threading.local()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run beside others; may be entered again by a thread that is inside."""
        depth = getattr(self._own, "depth", 0)
        if depth == 0:
            with self._condition:
                # A thread inside goes on in any case: who waits to be alone waits for it.
                self._condition.wait_for(lambda: not self._alone and not self._waiting)
                self._together += 1
        self._own.depth = depth + 1
        try:
            yield
        finally:
            self._own.depth = depth
            if depth == 0:
                with self._condition:
                    self._together -= 1
                    self._condition.notify_all()

    @contextmanager
    def alone(self, doing: str) -> Iterator[None]:
        """Run when nobody else does. Raises RequestError inside `together()`: it would wait for itself."""
        if getattr(self._own, "depth", 0):
            raise RequestError(f"{doing}: cannot be called while a request runs, as from its callback; call it after")
        with self._condition:
            self._waiting += 1
            try:
                self._condition.wait_for(lambda: not self._alone and not self._together)
                self._alone = True
            finally:
                self._waiting -= 1
                self._condition.notify_all()
        try:
            yield
        finally:
            with self._condition:
                self._alone = False
                self._condition.notify_all()
