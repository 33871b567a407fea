"""Measures the latency of an image: systems side by side, in one run, on this machine.

    python -m zimage_rt.benchmarks.latency --bundle engines/nano --checkpoint checkpoints/zimage-nano

Prints the median of `--repeats` warm images, with the systems interleaved so that noise affects all of them, and the
time from the start of a process to its first image.

On a GPU (`--device cuda`, the default on a machine with one) this runs `zimage_rt.benchmarks.gpu` with its options:
more systems, random weights of the full size, and figures per stage.
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

from zimage_rt.bundle.manifest import read_manifest

PROMPT = "a panda on a blue background"
SYSTEMS = ("diffusers", "zimage_rt")

# Loads a system and draws an image, in a cold process.
COLD = """
import sys
from zimage_rt.benchmarks.systems.base import load_system
name, key, path, vae, prompt = sys.argv[1:]
load_system(name, **{key: path}).generate([prompt], [1], vae=vae)
"""


def source(name: str, arguments: argparse.Namespace) -> tuple[str, str]:
    """The name and the value of the option that a system is loaded with."""
    return ("checkpoint", arguments.checkpoint) if name == "diffusers" else ("bundle", arguments.bundle)


def warm(systems: dict[str, System], arguments: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a warm image per system."""
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for repeat in range(arguments.repeats + 1):
        for name, system in systems.items():
            start = time.perf_counter()
            system.generate(
                # A new prompt each time, so that no engine reuses an encoded prompt.
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
    """Median seconds from start to end of a process that draws one image."""
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
    parser.add_argument("--bundle", default="engines/nano", help="the bundle of zimage_rt")
    parser.add_argument("--checkpoint", default="checkpoints/zimage-nano", help="the folder of diffusers")
    parser.add_argument("--size", type=int, default=256, help="width and height in pixels")
    parser.add_argument("--steps", type=int, default=8, help="function evaluations")
    parser.add_argument("--vae", choices=["tiny", "full"], default="tiny")
    parser.add_argument("--repeats", type=int, default=9, help="warm images per system")
    parser.add_argument("--cold-repeats", type=int, default=3, help="processes per system")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    arguments = parser.parse_args(argv)
    first_image = {name: cold(name, arguments) for name in SYSTEMS}
    systems = {name: load_system(name, **dict([source(name, arguments)])) for name in SYSTEMS}
    one_image = warm(systems, arguments)
    precision = read_manifest(Path(arguments.bundle)).precision
    report = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "shape": f"{arguments.size}x{arguments.size}, {arguments.steps} evaluations, {arguments.vae} VAE, {precision}",
        "one_picture_s": one_image,
        "process_start_to_first_picture_s": first_image,
    }
    print(f"{report['machine']}; {report['shape']}")
    for figure, seconds in (("one image", one_image), ("process start to first image", first_image)):
        ratio = seconds["zimage_rt"] / seconds["diffusers"]
        print(f"{figure}: diffusers {seconds['diffusers']:.3f} s, zimage_rt {seconds['zimage_rt']:.3f} s, {ratio:.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
