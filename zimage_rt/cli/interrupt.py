"""A handler of Ctrl-C that loses no interrupt.

Python drops a KeyboardInterrupt that is raised inside a destructor or a callback of a weak reference, for example at
the end of a thread pool. Loops therefore call `check` after each item.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType

_interrupted = threading.Event()


def install() -> None:
    """Install a handler that records Ctrl-C and raises KeyboardInterrupt."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _remember)


def check() -> None:
    """Raise KeyboardInterrupt if Ctrl-C was pressed since `install`."""
    if _interrupted.is_set():
        raise KeyboardInterrupt


def _remember(number: int, frame: FrameType | None) -> None:
    _interrupted.set()
    signal.default_int_handler(number, frame)
