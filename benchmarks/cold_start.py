"""Times the stages of a new process from its start to its first image, and its peak of device memory."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

INTERVAL = 0.002  # seconds between two samples of the device's memory
PROMPT = "a small red house beside a quiet lake"

# Prints a JSON line: seconds since the parent started it, and the engine's own figures.
CHILD = """
import json, sys, time
began, bundle, backend, options, height, width, evaluations = sys.argv[1:]
stages = {"interpreter": time.time() - float(began)}
import zimage_rt
stages["import"] = time.time() - float(began)
engine = zimage_rt.Engine.load(bundle, backend=backend, verify=False, backend_options=json.loads(options))
stages["load"] = time.time() - float(began)
settings = dict(height=int(height), width=int(width), num_inference_steps=int(evaluations), vae="tiny", seed=1)
result = engine.generate(sys.stdin.read(), **settings)
stages["first image"] = time.time() - float(began)
assert result.images.shape[1:3] == (int(height), int(width))
again = engine.generate("another " + "image", **settings)
stages["second image"] = time.time() - float(began)
print(json.dumps({
    "stages": stages,
    "first_timings": dict(result.timings),
    "second_timings": dict(again.timings),
    "memory": dict(engine.pipeline.memory()) if hasattr(engine.pipeline, "memory") else {},
    "torch_imported": "torch" in sys.modules,
}))
"""


def touch(bundle: Path) -> None:
    """Reads a bundle's files into the page cache."""

    def read(path: Path) -> None:
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 26):
                pass

    with ThreadPoolExecutor() as pool:
        list(pool.map(read, bundle.iterdir()))


class MemoryWatch:
    """Context manager for the peak of device memory in bytes, of all processes; None without a GPU."""

    def __init__(self, device: str) -> None:
        self.peak: int | None = None
        self._device = device
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryWatch:
        if self._device != "cpu":
            self._before = torch.cuda.mem_get_info()[0]
            self.peak = 0
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL):
            self.peak = max(self.peak or 0, self._before - torch.cuda.mem_get_info()[0])


def cold_start(
    bundle: Path,
    backend: str,
    options: Mapping[str, Any],
    height: int,
    width: int,
    evaluations: int,
    device: str,
) -> dict[str, Any]:
    """Runs the process; returns its stages in seconds since its start, its timings and its peak of device memory.

    Raises:
        RuntimeError: the process failed; the message ends its standard error.
    """
    with MemoryWatch(device) as watch:
        arguments = [str(bundle), backend, json.dumps(dict(options)), str(height), str(width), str(evaluations)]
        process = subprocess.run(
            [sys.executable, "-c", CHILD, repr(time.time()), *arguments], input=PROMPT, capture_output=True, text=True
        )
    if process.returncode:
        raise RuntimeError(" ".join(process.stderr.split("\n")[-2:]).strip() or f"exit status {process.returncode}")
    found: dict[str, Any] = json.loads(process.stdout.strip().splitlines()[-1])
    return {**found, "peak_bytes": watch.peak}
