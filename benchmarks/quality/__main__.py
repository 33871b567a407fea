"""Draw the held-out prompts and judge the pictures.

    python -m zimage_rt.benchmarks.quality --system diffusers --checkpoint checkpoints/zimage-nano

Draws the held-out prompts and prints one line a figure, each a share of right answers.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from PIL import Image
from zimage_rt.benchmarks.quality.judge import DATA, Judge, summarise
from zimage_rt.benchmarks.systems.base import SYSTEMS, load_system

CHUNK = 16


def read_prompts(count: int, path: Path = DATA / "prompts.jsonl") -> list[dict[str, Any]]:
    """Return the first ``count`` held-out prompts; the file is interleaved: any count is fair."""
    lines = path.read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines[:count]]


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m zimage_rt.benchmarks.quality")
    parser.add_argument("--system", choices=sorted(SYSTEMS), default="diffusers")
    parser.add_argument("--checkpoint", help="a diffusers folder, for --system diffusers")
    parser.add_argument("--bundle", help="a bundle, for --system zimage_rt")
    parser.add_argument("--backend", help="the bundle's backend, for --system zimage_rt")
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--vae", choices=["tiny", "full"], default="tiny")
    parser.add_argument("--steps", type=int, default=8, help="function evaluations")
    parser.add_argument("--guidance-scale", type=float, default=0.0)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--save", type=Path, help="write the pictures into this folder")
    arguments = parser.parse_args(argv)
    prompts = read_prompts(arguments.prompts)
    options = {k: getattr(arguments, k) for k in ("checkpoint", "bundle", "backend")}
    system, judge = load_system(arguments.system, **options), Judge()
    if arguments.save:
        arguments.save.mkdir(parents=True, exist_ok=True)
    judged, drawing, start = [], 0.0, time.time()
    for i in range(0, len(prompts), CHUNK):
        part = prompts[i : i + CHUNK]
        before = time.time()
        images = system.generate(
            [p["caption"] for p in part],
            [p["seed"] for p in part],
            num_inference_steps=arguments.steps,
            guidance_scale=arguments.guidance_scale,
            vae=arguments.vae,
        )
        drawing += time.time() - before
        for number, (prompt, image) in enumerate(zip(part, images, strict=True), start=i):
            judged.append((prompt, judge.score(image, prompt["scene"])))
            if arguments.save:
                Image.fromarray(image).save(arguments.save / f"{number:04d}.png")
        print(f"\r{len(judged)} / {len(prompts)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    figures = summarise(judged)
    for name, value in figures.items():
        print(f"{name:24s} {100 * value:6.2f} %")
    print(f"{len(prompts)} prompts, {drawing:.0f} s drawing, {time.time() - start:.0f} s in all")
    if arguments.json:
        report = {
            "system": arguments.system,
            "vae": arguments.vae,
            "prompts": len(prompts),
            "num_inference_steps": arguments.steps,
            "guidance_scale": arguments.guidance_scale,
            "figures": figures,
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
