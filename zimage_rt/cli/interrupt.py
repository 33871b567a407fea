"""Ctrl-C that is never lost.

Python drops a KeyboardInterrupt that is raised inside a destructor or a weak reference's callback, as the end of a
thread pool has one. Loops therefore ask after each item whether there was one.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType

_interrupted = threading.Event()


def install() -> None:
    """Remember every Ctrl-C, beside raising KeyboardInterrupt for it."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _remember)


def check() -> None:
    """Raise KeyboardInterrupt if there was a Ctrl-C."""
    if _interrupted.is_set():
        raise KeyboardInterrupt


def _remember(number: int, frame: FrameType | None) -> None:
    _interrupted.set()
    signal.default_int_handler(number, frame)
