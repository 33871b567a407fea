"""Judges inpainting: the masked half must change to what the prompt says, and the other half must not change.

    python -m zimage_rt.benchmarks.quality.edits --bundle engines/nano --cases 100

Every case draws a held-out pair, then inpaints its left half with another subject. The judge looks for the new subject
among all drawings; the right half must keep its bytes.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image
from zimage_rt.benchmarks.quality.judge import DATA, Atlas, Judge, canvas_name
from zimage_rt.benchmarks.quality.prompts import read_prompts

import zimage_rt

SIDE = 256
STYLE_PHRASES = {"noto": "noto style", "flat": "flat style"}


def names_of(folder: Path) -> dict[str, str]:
    """English names of the subjects by code."""
    meta = json.loads((folder / "scenes.json").read_text("utf-8"))
    return dict(zip(meta["hexcodes"], meta["names"], strict=True))


def cases(folder: Path, count: int) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Pairs of (held-out prompt, the same scene with another subject on the left), a fixed choice."""
    codes = list(names_of(folder))
    found = []
    for prompt in read_prompts(10**9, folder / "prompts.jsonl"):
        scene = prompt["scene"]
        if prompt["unseen"] or scene["layout"] != "left_right" or canvas_name(scene) != f"{SIDE}x{SIDE}":
            continue
        others = [code for code in codes if code not in scene["subjects"]]
        new = random.Random(f"edit-{prompt['seed']}").choice(others)
        found.append((prompt, {**scene, "subjects": [new, scene["subjects"][1]]}))
    return found[:count]


def describe(scene: dict[str, Any], names: dict[str, str]) -> str:
    """Prompt for an edited scene."""
    left, right = (names[code] for code in scene["subjects"])
    return f"{left} on the left and {right} on the right, {scene['colour']} background, {STYLE_PHRASES[scene['style']]}"


def measure(engine: zimage_rt.Engine, folder: Path, count: int, save: Path | None = None) -> dict[str, float]:
    """Shares of the cases with the new subject on the left, the old one on the right, and the right half unchanged."""
    judge, names = Judge(Atlas.load(folder)), names_of(folder)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[:, : SIDE // 2] = 255
    answers: dict[str, list[bool]] = {"right before": [], "right after": [], "new on the left": [], "bytes kept": []}
    for number, (prompt, scene) in enumerate(cases(folder, count)):
        before = engine.generate(prompt["caption"], seed=prompt["seed"], height=SIDE, width=SIDE).images[0]
        after = engine.generate(
            describe(scene, names), seed=prompt["seed"], image=before, mask=mask, strength=1.0
        ).images[0]
        answers["right before"].append(judge.score(before, prompt["scene"])["subject_pair"][1])
        left, right = judge.score(after, scene)["subject_pair"]
        answers["new on the left"].append(left)
        answers["right after"].append(right)
        answers["bytes kept"].append(bool((after[:, SIDE // 2 :] == before[:, SIDE // 2 :]).all()))
        if save is not None:
            save.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.concatenate([before, after], axis=1)).save(save / f"{number:03d}.png")
    return {name: float(np.mean(values)) for name, values in answers.items()}


def main(
    bundle: Annotated[Path, typer.Option(help="Bundle of zimage-nano.")],
    count: Annotated[int, typer.Option("--cases", help="Number of edits.")] = 100,
    backend: Annotated[str, typer.Option(help="Backend: onnxruntime, cuda, tensorrt or tensorrt_rtx.")] = "onnxruntime",
    data: Annotated[Path, typer.Option(help="Folder of the judge's data.")] = DATA,
    save: Annotated[Path | None, typer.Option(help="Folder for images, before and after side by side.")] = None,
    output: Annotated[Path | None, typer.Option("--json", help="File to write the figures to as JSON.")] = None,
) -> None:
    """Print each share."""
    figures = measure(zimage_rt.Engine.load(bundle, backend=backend), data, count, save)
    for name, value in figures.items():
        typer.echo(f"{name:16s} {100 * value:6.2f} %")
    if output is not None:
        output.write_text(json.dumps({"cases": count, "figures": figures}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
