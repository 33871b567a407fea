"""Profiles an evaluation per kernel with Nsight Compute (`ncu`), which must be on the PATH.

    python -m zimage_rt.benchmarks.profile --layers 4

Weights are random, of the full width, with fewer layers than the original: every layer launches the same kernels. ncu
runs kernels one by one with cold caches, so only the shares are meaningful: the sum exceeds an evaluation's time.
"""

from __future__ import annotations

import argparse
import collections
import csv
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import zimage_rt

METRIC = "gpu__time_duration.sum"


def evaluate(bundle: str, height: int, width: int, context_tokens: int) -> None:
    """Runs an evaluation between the profiler's start and stop, after one that autotunes the matrix products."""
    from zimage_rt import _cuda

    engine = zimage_rt.Engine.load(bundle, backend="cuda", verify=False)
    transformer = engine.pipeline.module("transformer")
    rng = np.random.default_rng(0)
    dim = engine.manifest.module("transformer").config["dim"]
    inputs = {
        "latents": rng.standard_normal((1, 16, height // 8, width // 8), np.float32),
        "timestep": np.full(1, 0.5, np.float32),
        "context": rng.standard_normal((1, context_tokens, dim), np.float32),
    }
    transformer(inputs)
    _cuda.profiler(True)
    transformer(inputs)
    _cuda.profiler(False)


def table(log: Path) -> list[tuple[str, int, float]]:
    """(kernel, launches, total microseconds) from ncu's CSV, longest first."""
    lines = log.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith('"ID"'))
    total: dict[str, float] = collections.defaultdict(float)
    count: dict[str, int] = collections.defaultdict(int)
    for row in csv.DictReader(lines[start:]):
        if row["Metric Name"] == METRIC:
            name = row["Kernel Name"].split("(")[0].rpartition("::")[2]
            scale = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3}
            total[name] += float(row["Metric Value"].replace(",", "")) * scale[row["Metric Unit"]]
            count[name] += 1
    return sorted(((name, count[name], total[name]) for name in total), key=lambda line: -line[2])


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m zimage_rt.benchmarks.profile")
    parser.add_argument("--layers", type=int, default=4, help="main layers")
    parser.add_argument("--precision", choices=["bf16", "fp16"], default="bf16")
    parser.add_argument("--size", type=int, default=1024, help="width and height in pixels")
    parser.add_argument("--context-tokens", type=int, default=128, help="tokens of the context")
    parser.add_argument("--bundle", help=argparse.SUPPRESS)  # the profiled process itself
    arguments = parser.parse_args(argv)
    if arguments.bundle:
        evaluate(arguments.bundle, arguments.size, arguments.size, arguments.context_tokens)
        return 0

    from zimage_rt.benchmarks.random_bundle import NANO, configs_of, shortened, write_random_bundle
    from zimage_rt.benchmarks.random_checkpoint import random_checkpoint

    with tempfile.TemporaryDirectory(prefix="profile-") as name:
        folder = Path(name)
        configs = shortened(configs_of("full"), arguments.layers, 1, 1)
        checkpoint = random_checkpoint(NANO / "tokenizer", configs)
        write_random_bundle(checkpoint, folder / "bundle", arguments.precision)
        command = ["ncu", "--profile-from-start", "off", "--clock-control", "none", "--metrics", METRIC, "--csv"]
        command += ["--log-file", str(folder / "log.csv"), sys.executable, "-m", "zimage_rt.benchmarks.profile"]
        command += ["--bundle", str(folder / "bundle"), "--size", str(arguments.size)]
        command += ["--context-tokens", str(arguments.context_tokens)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        kernels = table(folder / "log.csv")
    whole = sum(microseconds for _, _, microseconds in kernels)
    for kernel, launches, microseconds in kernels:
        print(f"{microseconds:10.1f} us {microseconds / whole:6.1%} {launches:5d} x  {kernel}")
    print(f"{whole:10.1f} us in all: {arguments.layers} layers and one refiner, {arguments.size}x{arguments.size}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
