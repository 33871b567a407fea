"""Reports of benchmarks: self-contained lines, written to the disk one by one, and their table."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

OURS = "zimage_rt"
PACKAGES = ("torch", "triton", "diffusers", "transformers", "numpy")


@dataclasses.dataclass(frozen=True)
class Line:
    """A figure of a system.

    Attributes:
        figure: name of the measurement; lines with the same figure, shape and precision are compared.
        system, precision, shape: the measured system, its number format, and the sizes of the request.
        evaluations: evaluations of the transformer within the measurement.
        includes: description of what the time or the memory covers.
        unit: `ms`, `s` or `GB`.
        median, low, high: median, smallest and largest of `count` values.
        detail: parts of the figure, if any.
    """

    figure: str
    system: str
    precision: str
    shape: str
    evaluations: int
    includes: str
    unit: str
    median: float
    low: float
    high: float
    count: int
    detail: dict[str, Any] = dataclasses.field(default_factory=dict)


def gpu_state() -> str:
    """Name, driver, clocks, temperature and power of the first GPU from nvidia-smi; empty without a GPU."""
    query = "name,driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw,power.limit"
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def versions() -> dict[str, str]:
    """Versions of zimage_rt, Python and the packages of the reference systems."""
    import torch

    import zimage_rt

    found = {"zimage_rt": zimage_rt.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found |= {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
    return found


class Report:
    """Lines and skipped measurements; the file is rewritten after each, so that an abort loses nothing."""

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self._path = path
        self.lines: list[Line] = []
        self.left_out: list[dict[str, str]] = []
        self.seconds: dict[str, float] = {}  # of loading, compiling and each part
        self.notes: dict[str, Any] = {}
        self._gpu, self._gpu_after, self._versions = gpu_state(), "", versions()
        self._settings = settings

    def add(self, values: Sequence[float], **fields: Any) -> Line:
        """Add the median and spread of `values`; the other fields are `Line`'s."""
        line = Line(median=statistics.median(values), low=min(values), high=max(values), count=len(values), **fields)
        self.lines.append(line)
        print(row(line), flush=True)
        self.save()
        return line

    def leave_out(self, what: str, why: str) -> None:
        """Record a measurement that was skipped, with the reason."""
        self.left_out.append({"what": what, "why": why})
        print(f"left out: {what}: {why}", flush=True)
        self.save()

    def ratios(self) -> list[str]:
        """Our median over each other system's for the same figure, shape and precision."""
        text = []
        for ours in self.lines:
            if ours.system != OURS:
                continue
            for other in self.lines:
                same = (other.figure, other.shape, other.precision) == (ours.figure, ours.shape, ours.precision)
                if other.system != OURS and same:
                    ratio = ours.median / other.median
                    text.append(f"{ours.figure}, {ours.shape}, {ours.precision}: {ratio:.3f} of {other.system}")
        return text

    def finish(self) -> str:
        """Record the GPU's state, write the file and return the table."""
        self._gpu_after = gpu_state()
        self.save()
        return self.table()

    def save(self) -> None:
        """Write the JSON file."""
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        report = {
            "machine": {"gpu_before": self._gpu, "gpu_after": self._gpu_after, "cpu": platform.machine()},
            "versions": self._versions,
            "settings": self._settings,
            "seconds": self.seconds,
            "notes": self.notes,
            "lines": [dataclasses.asdict(line) for line in self.lines],
            "ratios": self.ratios(),
            "left_out": self.left_out,
        }
        self._path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")

    def table(self) -> str:
        """Text of all lines, skipped measurements and ratios."""
        rows = [self._gpu or "no GPU"]
        rows += [row(line) for line in sorted(self.lines, key=lambda line: (line.figure, line.shape, line.precision))]
        rows += [f"left out: {item['what']}: {item['why']}" for item in self.left_out]
        return "\n".join(rows + self.ratios())


def row(line: Line) -> str:
    """Formats a line."""
    digits = {"ms": 3, "s": 3, "GB": 2}[line.unit]
    median, low, high = (f"{value:.{digits}f}" for value in (line.median, line.low, line.high))
    return (
        f"{line.figure:<26} {line.system:<26} {line.precision:<5} {line.shape:<36} {line.evaluations:>2} eval  "
        f"{median:>9} {line.unit:<2} ({low} … {high}, {line.count})  {line.includes}"
    )
