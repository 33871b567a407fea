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
from zimage_rt.benchmarks.quality.judge import DATA, UNSEEN, canvas_name, summarise
from zimage_rt.benchmarks.quality.judges import judges
from zimage_rt.benchmarks.systems.base import SYSTEMS, load_system

CHUNK = 16


def read_prompts(count: int, path: Path = DATA / "prompts.jsonl") -> list[dict[str, Any]]:
    """Return the first ``count`` held-out prompts; the file is interleaved: any count is fair."""
    lines = path.read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines[:count]]


def kind_of(prompt: dict[str, Any]) -> str:
    """Return what line of the figures a prompt is for, e.g. ``single``, ``unseen_pair``, ``single_192x320``."""
    layout = {"left_right": "pair", "top_bottom": "pair"}.get(prompt["scene"]["layout"], prompt["scene"]["layout"])
    canvas = canvas_name(prompt["scene"])
    name = f"{UNSEEN}{layout}" if prompt["unseen"] else layout
    return name if canvas == "256x256" else f"{name}_{canvas}"


def take_kinds(prompts: list[dict[str, Any]], each: int, kinds: list[str] | None = None) -> list[dict[str, Any]]:
    """Return the first ``each`` prompts of every kind, or of the kinds named, in the file's order."""
    taken: dict[str, int] = {}
    chosen = []
    for prompt in prompts:
        kind = kind_of(prompt)
        taken[kind] = taken.get(kind, 0) + 1
        if taken[kind] <= each and (not kinds or kind in kinds):
            chosen.append(prompt)
    return chosen


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m zimage_rt.benchmarks.quality")
    parser.add_argument("--system", choices=sorted(SYSTEMS), default="diffusers")
    parser.add_argument("--checkpoint", help="a diffusers folder, for --system diffusers")
    parser.add_argument("--bundle", help="a bundle, for --system zimage_rt")
    parser.add_argument("--backend", help="the bundle's backend, for --system zimage_rt")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the atlas and the prompts")
    parser.add_argument("--prompts", type=int, default=300, help="the first so many of the file")
    parser.add_argument("--each", type=int, help="instead: so many of every kind of prompt")
    parser.add_argument("--kinds", nargs="+", help="with --each: only these, e.g. single unseen_pair")
    parser.add_argument("--vae", choices=["tiny", "full"], default="tiny")
    parser.add_argument("--steps", type=int, default=8, help="function evaluations")
    parser.add_argument("--guidance-scale", type=float, default=0.0)
    parser.add_argument("--processes", type=int, help="that judge; as many as cores if left out")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--save", type=Path, help="write the pictures into this folder")
    arguments = parser.parse_args(argv)
    prompts = read_prompts(10**9 if arguments.each else arguments.prompts, arguments.data / "prompts.jsonl")
    if arguments.each:
        prompts = take_kinds(prompts, arguments.each, arguments.kinds)
    # A system draws one size at a time.
    prompts.sort(key=lambda p: canvas_name(p["scene"]))
    options = {k: getattr(arguments, k) for k in ("checkpoint", "bundle", "backend")}
    system = load_system(arguments.system, **options)
    if arguments.save:
        arguments.save.mkdir(parents=True, exist_ok=True)
    drawn, drawing, start = 0, 0.0, time.time()
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
            drawing += time.time() - before
            for number, (prompt, image) in enumerate(zip(part, images, strict=True), start=drawn):
                judging.give(image, prompt["scene"])
                if arguments.save:
                    Image.fromarray(image).save(arguments.save / f"{number:04d}.png")
            drawn += len(part)
            print(f"\r{drawn} / {len(prompts)}", end="", file=sys.stderr, flush=True)
        judged = list(zip(prompts, judging.answers(), strict=True))
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
