"""Compares a bundle's images with diffusers' for the same checkpoint, prompts, latents and evaluations.

    python -m zimage_rt.benchmarks.fidelity engines/nano engines/nano-fp16 --checkpoint checkpoints/zimage-nano

Prints a line per bundle and setting: the mean and the worst PSNR in dB over the prompts.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from zimage_rt.benchmarks.quality.prompts import read_prompts
from zimage_rt.benchmarks.systems.base import System, load_system

# Each VAE, then guidance with a negative prompt.
SETTINGS: tuple[dict[str, Any], ...] = (
    {"vae": "tiny", "guidance_scale": 0.0},
    {"vae": "full", "guidance_scale": 0.0},
    {"vae": "tiny", "guidance_scale": 2.0, "negative_prompt": "text, blue background"},
)


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 images in dB; identical images give 100."""
    error = float(np.mean((first.astype(np.float64) - second.astype(np.float64)) ** 2))
    return min(100.0, float(10 * np.log10(255.0**2 / error))) if error else 100.0


def compare(system: System, reference: System, prompts: list[dict[str, Any]], setting: dict[str, Any]) -> list[float]:
    """PSNR in dB of each prompt's image."""
    captions, seeds = [p["caption"] for p in prompts], [p["seed"] for p in prompts]
    expected = reference.generate(captions, seeds, **setting)
    actual = system.generate(captions, seeds, **setting)
    return [psnr(image, other) for image, other in zip(actual, expected, strict=True)]


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m zimage_rt.benchmarks.fidelity")
    parser.add_argument("bundles", nargs="+", help="folders of bundles")
    parser.add_argument("--checkpoint", default="checkpoints/zimage-nano", help="a diffusers folder, the reference")
    parser.add_argument("--prompts", type=int, default=20, help="number of held-out prompts")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    arguments = parser.parse_args(argv)
    prompts = read_prompts(arguments.prompts)
    reference = load_system("diffusers", checkpoint=arguments.checkpoint)
    report = []
    for bundle in arguments.bundles:
        system = load_system("zimage_rt", bundle=bundle)
        for setting in SETTINGS:
            scores = compare(system, reference, prompts, setting)
            report.append({"bundle": bundle, **setting, "mean_db": np.mean(scores), "worst_db": np.min(scores)})
            print(f"{bundle}  {setting}  mean {np.mean(scores):.1f} dB, worst {np.min(scores):.1f} dB")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
