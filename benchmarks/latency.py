"""How long one picture takes: systems side by side, in one run, on this machine.

    python -m zimage_rt.benchmarks.latency --bundle engines/nano --checkpoint checkpoints/zimage-nano

Prints one line a figure: the median of `--repeats` warm pictures, alternating between the systems so that a noisy
machine is noisy for all of them, and the time from process start to the first picture, each in a process of its own.

On a GPU (`--device cuda`, the default where there is one) this is `zimage_rt.benchmarks.gpu`, with that command's
options: many systems, random weights of the full size, and figures by stage.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

from zimage_rt.benchmarks.systems.base import System, load_system

PROMPT = "a panda on a blue background"
SYSTEMS = ("diffusers", "zimage_rt")

# Loads a system and draws once: what a cold process pays.
COLD = """
import sys
from zimage_rt.benchmarks.systems.base import load_system
name, key, path, vae, prompt = sys.argv[1:]
load_system(name, **{key: path}).generate([prompt], [1], vae=vae)
"""


def source(name: str, arguments: argparse.Namespace) -> tuple[str, str]:
    """Return the option a system is loaded with and its value."""
    return ("checkpoint", arguments.checkpoint) if name == "diffusers" else ("bundle", arguments.bundle)


def warm(systems: dict[str, System], arguments: argparse.Namespace) -> dict[str, float]:
    """Return the median seconds of one picture for each system."""
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for repeat in range(arguments.repeats + 1):
        for name, system in systems.items():
            start = time.perf_counter()
            system.generate(
                # A new prompt each time: an engine that remembers encoded prompts must encode it.
                [f"{PROMPT} {repeat}"],
                [repeat],
                height=arguments.size,
                width=arguments.size,
                num_inference_steps=arguments.steps,
                vae=arguments.vae,
            )
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def cold(name: str, arguments: argparse.Namespace) -> float:
    """Return the median seconds from process start to the end of a process that drew one picture."""
    values = []
    for _ in range(arguments.cold_repeats):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", COLD, name, *source(name, arguments), arguments.vae, PROMPT], check=True)
        values.append(time.perf_counter() - start)
    return statistics.median(values)


def has_gpu() -> bool:
    """Whether torch sees a GPU."""
    import torch

    return torch.cuda.is_available()


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    chooser = argparse.ArgumentParser(add_help=False)
    chooser.add_argument("--device", choices=["cpu", "cuda"])
    chosen, argv = chooser.parse_known_args(argv)
    if (chosen.device or ("cuda" if has_gpu() else "cpu")) == "cuda":
        from zimage_rt.benchmarks import gpu

        return gpu.main(argv)
    parser = argparse.ArgumentParser(prog="python -m zimage_rt.benchmarks.latency", parents=[chooser])
    parser.add_argument("--bundle", default="engines/nano")
    parser.add_argument("--checkpoint", default="checkpoints/zimage-nano")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=8, help="function evaluations")
    parser.add_argument("--vae", choices=["tiny", "full"], default="tiny")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--cold-repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    first_picture = {name: cold(name, arguments) for name in SYSTEMS}
    systems = {name: load_system(name, **dict([source(name, arguments)])) for name in SYSTEMS}
    one_picture = warm(systems, arguments)
    report = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "shape": f"{arguments.size}x{arguments.size}, {arguments.steps} evaluations, {arguments.vae} VAE, fp32",
        "one_picture_s": one_picture,
        "process_start_to_first_picture_s": first_picture,
    }
    print(f"{report['machine']}; {report['shape']}")
    for figure, seconds in (("one picture", one_picture), ("process start to first picture", first_picture)):
        ratio = seconds["zimage_rt"] / seconds["diffusers"]
        print(f"{figure}: diffusers {seconds['diffusers']:.3f} s, zimage_rt {seconds['zimage_rt']:.3f} s, {ratio:.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
