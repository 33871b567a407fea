"""A limit on concurrent requests: each needs memory of its own, which the libraries keep for the next one."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class Gate:
    """A fair semaphore: `places` threads enter at once, the others wait in the order of arrival."""

    def __init__(self, places: int) -> None:
        self._free = places
        self._waiting: deque[threading.Event] = deque()
        self._lock = threading.Lock()
        self._own = threading.local()

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place inside the block. Reentrant: a thread that holds one does not wait again."""
        if getattr(self._own, "inside", False):
            yield
            return
        self._enter()
        self._own.inside = True
        try:
            yield
        finally:
            self._own.inside = False
            self._leave()

    def _enter(self) -> None:
        with self._lock:
            if self._free > 0 and not self._waiting:
                self._free -= 1
                return
            called = threading.Event()
            self._waiting.append(called)
        try:
            called.wait()
        except BaseException:  # Ctrl-C: the place is passed on to the next thread
            with self._lock:
                if not called.is_set():
                    self._waiting.remove(called)
                    raise
            self._leave()
            raise

    def _leave(self) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()  # handed over directly, so that no newcomer can take it in between
            else:
                self._free += 1
