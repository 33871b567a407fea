"""The packages `tensorrt` and `tensorrt_rtx`, and their callback interfaces in Python."""

from __future__ import annotations

import dataclasses
import importlib
import re
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

from ..errors import BuilderUnavailable
from ..tensorrt_options import TensorRTOptions

STEPS = 1000  # of a progress bar


@dataclasses.dataclass(frozen=True)
class Package:
    """Differences between the two packages.

    Attributes:
        name: the module to import, and the backend's name in the manifest.
        extra: the extra of zimage-rt that installs it.
        stripped: whether plans are built without weights and refitted at load.
        target: configures the GPUs to build for; returns their compute capabilities, such as `8.6`.
        timing_cache: whether it times kernels while it builds, and can store the timings.
    """

    name: str
    extra: str
    stripped: bool
    target: Callable[[Any, Any, TensorRTOptions], tuple[str, ...]]
    timing_cache: bool = False

    def load(self) -> ModuleType:
        """Imports the package. Raises BuilderUnavailable: it is not installed; the message names the extra."""
        try:
            return importlib.import_module(self.name)
        except ImportError as error:
            raise BuilderUnavailable(
                f"backend {self.name!r} needs the package {self.name}, which cannot be imported ({error}); "
                f"pip install 'zimage-rt[{self.extra}]'"
            ) from error


# The three classes below derive from classes of the package, so functions define them after its import. pybind11 needs
# explicit calls of its constructors.


def make_logger(trt: Any) -> Any:
    severe = (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR)

    class Logger(trt.ILogger):
        """Collects errors and the activation memory that the builder reports."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.activation_bytes = 0

        def log(self, severity: Any, msg: str) -> None:
            if severity in severe:
                self.errors.append(msg)
            elif match := re.match(r"Total Activation Memory: (\d+) bytes", msg):
                self.activation_bytes = max(self.activation_bytes, int(match[1]))

    return Logger()


def make_monitor(trt: Any, advance: Callable[[int], None], stop: threading.Event) -> Any:
    class Monitor(trt.IProgressMonitor):
        """Reports TensorRT's nested phases as one number; called from its threads."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._phases: dict[str, tuple[int, int]] = {}  # name → (steps done, steps in all), outermost first
            self._last = -1

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._phases[phase_name] = (0, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            self._phases.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            total = self._phases.get(phase_name, (0, 1))[1]
            self._phases[phase_name] = (step + 1, total)
            done, share = 0.0, 1.0
            for steps, whole in list(self._phases.values()):
                share /= max(whole, 1)
                done += steps * share
            if (now := int(min(done, 1.0) * STEPS)) > self._last:
                self._last = now
                advance(now)
            return not stop.is_set()

    return Monitor()


def make_writer(trt: Any, file: Any) -> Any:
    class Writer(trt.IStreamWriter):
        """Writes a plan as a stream. Stores an OSError, because TensorRT passes no exceptions on."""

        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                file.write(data)
                file.flush()
            except OSError as error:
                self.error = error
                return 0
            return len(data)

    return Writer()
