"""Draws the held-out prompts, judges the images and prints a line per figure: the share of right answers.

python -m zimage_rt.benchmarks.quality --system diffusers --checkpoint checkpoints/zimage-nano
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from PIL import Image
from zimage_rt.benchmarks.quality.judge import DATA, canvas_name, summarise
from zimage_rt.benchmarks.quality.judges import Answers, judges
from zimage_rt.benchmarks.quality.prompts import read_prompts, take_kinds
from zimage_rt.benchmarks.systems.base import SYSTEMS, System, load_system

CHUNK = 16


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m zimage_rt.benchmarks.quality")
    parser.add_argument("--system", choices=sorted(SYSTEMS), default="diffusers")
    parser.add_argument("--checkpoint", help="a diffusers folder, for --system diffusers")
    parser.add_argument("--bundle", help="a bundle, for --system zimage_rt")
    parser.add_argument("--backend", help="the bundle's backend, for --system zimage_rt")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the atlas and the prompts")
    parser.add_argument("--prompts", type=int, default=300, help="number of prompts, from the start of the file")
    parser.add_argument("--each", type=int, help="number of prompts of each kind, instead of --prompts")
    parser.add_argument("--kinds", nargs="+", help="with --each: only these kinds, e.g. single unseen_pair")
    parser.add_argument("--vae", choices=["tiny", "full"], default="tiny")
    parser.add_argument("--steps", type=int, default=8, help="function evaluations")
    parser.add_argument("--guidance-scale", type=float, default=0.0)
    parser.add_argument("--processes", type=int, help="processes of the judge; one per core by default")
    parser.add_argument("--json", type=Path, help="file to write the figures to as JSON")
    parser.add_argument("--beside", type=Path, help="JSON file of another run, whose figures are printed beside these")
    parser.add_argument("--save", type=Path, help="folder to write the images to")
    return parser.parse_args(argv)


def draw_and_judge(
    system: System, prompts: list[dict[str, Any]], arguments: argparse.Namespace
) -> tuple[list[tuple[dict[str, Any], Answers]], float]:
    """Draw the prompts, sorted by canvas, and judge the images.

    Returns (prompt, answers) pairs and the seconds spent drawing.
    """
    drawn, seconds = 0, 0.0
    with judges(arguments.data, arguments.processes) as judging:
        while drawn < len(prompts):
            scene = prompts[drawn]["scene"]
            part = [p for p in prompts[drawn : drawn + CHUNK] if canvas_name(p["scene"]) == canvas_name(scene)]
            before = time.time()
            images = system.generate(
                [p["caption"] for p in part],
                [p["seed"] for p in part],
                height=scene.get("height", 256),
                width=scene.get("width", 256),
                num_inference_steps=arguments.steps,
                guidance_scale=arguments.guidance_scale,
                vae=arguments.vae,
            )
            seconds += time.time() - before
            for number, (prompt, image) in enumerate(zip(part, images, strict=True), start=drawn):
                judging.give(image, prompt["scene"])
                if arguments.save:
                    Image.fromarray(image).save(arguments.save / f"{number:04d}.png")
            drawn += len(part)
            print(f"\r{drawn} / {len(prompts)}", end="", file=sys.stderr, flush=True)
        judged = list(zip(prompts, judging.answers(), strict=True))
    print(file=sys.stderr)
    return judged, seconds


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    arguments = parse(argv)
    prompts = read_prompts(10**9 if arguments.each else arguments.prompts, arguments.data / "prompts.jsonl")
    if arguments.each:
        prompts = take_kinds(prompts, arguments.each, arguments.kinds)
    prompts.sort(key=lambda p: canvas_name(p["scene"]))  # a batch has one size
    options = {k: getattr(arguments, k) for k in ("checkpoint", "bundle", "backend")}
    system = load_system(arguments.system, **options)
    if arguments.save:
        arguments.save.mkdir(parents=True, exist_ok=True)
    start = time.time()
    judged, drawing = draw_and_judge(system, prompts, arguments)
    figures = summarise(judged)
    other = json.loads(arguments.beside.read_text("utf-8"))["figures"] if arguments.beside else {}
    for name, value in figures.items():
        beside = f"   beside {100 * other[name]:6.2f} %  {100 * (value - other[name]):+.2f}" if name in other else ""
        print(f"{name:24s} {100 * value:6.2f} %{beside}")
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
