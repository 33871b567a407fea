"""Judges the style LoRA and the ControlNet of zimage-nano.

    python -m zimage_rt.benchmarks.quality.adapters lora --bundle engines/nano --lora style_lora.safetensors
    python -m zimage_rt.benchmarks.quality.adapters control --bundle engines/nano-control

`lora` draws held-out prompts without the LoRA, at weights 0.5 and 1, and again after unloading it. The style is a
cyanotype: brightness mapped to tones from deep blue to ice blue. The distance of an image from the style is the mean
distance of its pixels from the line between the two tones. Subjects are judged against drawings in the same style.

`control` gives the ControlNet a white silhouette on black, shifted by some tokens from the drawing's usual place. It
judges whether the named drawing is at the silhouette's place; the prompt names no place.

`checkpoints/training/style_lora.py` and `controlnet.py` train both.
"""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image
from zimage_rt.benchmarks.quality.edits import STYLE_PHRASES, names_of
from zimage_rt.benchmarks.quality.judge import DATA, Atlas, Judge, canvas_name
from zimage_rt.benchmarks.quality.prompts import read_prompts

import zimage_rt

SIDE = 256
TOKEN = 16  # pixels
# Tones of black and white, and weights of brightness; the same as in checkpoints/training/cyanotype.py.
DARK, LIGHT = np.array([12, 36, 110], np.float32), np.array([214, 238, 255], np.float32)
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
IN_STYLE = 12.0  # largest mean distance, in levels, of an image in the style
FAR = 3  # least shift along an axis in tokens, beyond the judge's reach
SCALES = (0.0, 0.5, 0.75, 1.0)  # 0.75 is a request's default

app = typer.Typer(add_completion=False, help=__doc__.splitlines()[0])


# --- the style --------------------------------------------------------------------------------------------------------


def cyanotype(pixels: np.ndarray) -> np.ndarray:
    """Converts pixels [..., 3] of 0…255 to the style, as floats."""
    return DARK + (pixels @ LUMA / 255)[..., None] * (LIGHT - DARK)


def distance_from_style(image: np.ndarray) -> float:
    """Mean distance of an image's pixels from the line between the two tones, in levels."""
    axis = LIGHT - DARK
    pixels = image.astype(np.float32) - DARK
    along = (pixels @ axis / (axis @ axis)).clip(0, 1)
    return float(np.linalg.norm(pixels - along[..., None] * axis, axis=-1).mean())


def in_the_style(atlas: Atlas) -> Atlas:
    """Converts drawings and backgrounds to the style, which is affine and so commutes with composing them."""
    colours = {name: cyanotype(255 * colour) / 255 for name, colour in atlas.colours.items()}
    sprites = atlas.sprites.copy()
    sprites[..., :3] = np.rint(cyanotype(sprites[..., :3].astype(np.float32)))
    return dataclasses.replace(atlas, sprites=sprites, colours=colours)


def single_prompts(folder: Path, count: int) -> list[dict[str, Any]]:
    """The first held-out prompts of single drawings at 256 × 256, in phrasings of the training data."""
    found = [
        prompt
        for prompt in read_prompts(10**9, folder / "prompts.jsonl")
        if prompt["scene"]["layout"] == "single"
        and not prompt["unseen"]
        and canvas_name(prompt["scene"]) == f"{SIDE}x{SIDE}"
    ]
    return found[:count]


def measure_lora(
    engine: zimage_rt.Engine, lora: Path, folder: Path, count: int, save: Path | None = None
) -> dict[str, float]:
    """Distances from the style without the LoRA, at 0.5 and at 1, and shares of the images; see the module."""
    prompts = single_prompts(folder, count)

    def draw() -> list[np.ndarray]:
        return [engine.generate(p["caption"], seed=p["seed"], height=SIDE, width=SIDE).images[0] for p in prompts]

    without = draw()
    name = engine.load_lora(lora)
    styled = draw()
    engine.set_loras({name: 0.5})
    half = draw()
    engine.unload_lora(name)
    back = draw()
    atlas = Atlas.load(folder)
    plain_judge, style_judge = Judge(atlas), Judge(in_the_style(atlas))
    distances = {
        kind: [distance_from_style(image) for image in images]
        for kind, images in (("without", without), ("at 0.5", half), ("at 1", styled))
    }
    answers: dict[str, list[bool]] = {
        "in the style without": [d <= IN_STYLE for d in distances["without"]],
        "in the style at 1": [d <= IN_STYLE for d in distances["at 1"]],
        "between at 0.5": [
            one < half_way < none
            for none, half_way, one in zip(*(distances[k] for k in ("without", "at 0.5", "at 1")), strict=True)
        ],
        "subject without": _subjects(plain_judge, without, prompts),
        "subject at 1": _subjects(style_judge, styled, prompts),
        "bytes back": [a.tobytes() == b.tobytes() for a, b in zip(without, back, strict=True)],
    }
    _save(save, [np.concatenate(row, axis=1) for row in zip(without, half, styled, strict=True)])
    figures = {f"distance {kind}": float(np.mean(values)) for kind, values in distances.items()}
    return figures | {name: float(np.mean(values)) for name, values in answers.items()}


def _subjects(judge: Judge, images: list[np.ndarray], prompts: list[dict[str, Any]]) -> list[bool]:
    """Whether the named subject is the nearest of all, per image."""
    scored = (judge.score(image, p["scene"]) for image, p in zip(images, prompts, strict=True))
    return [answer for answers in scored for answer in answers["subject"]]


# --- the ControlNet ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """A scene of a single drawing, a prompt that names no place, and the silhouette's place."""

    scene: dict[str, Any]
    prompt: str
    seed: int
    usual: tuple[int, int]  # the drawing's centre without a control image, in pixels
    shown: tuple[int, int]  # the silhouette's centre


def shifted_cases(atlas: Atlas, folder: Path, count: int) -> list[Case]:
    """Held-out scenes of single drawings, each shifted by whole tokens; a fixed choice."""
    names, cases = names_of(folder), []
    for prompt in single_prompts(folder, count):
        scene = {**prompt["scene"], "size": "medium"}
        ((x, y),) = atlas.places(scene)
        reach = (SIDE // 2 - atlas.sizes["single"]["medium"] // 2 - TOKEN // 2) // TOKEN
        steps = range(-reach, reach + 1)
        shifts = [(dx, dy) for dx in steps for dy in steps if max(abs(dx), abs(dy)) >= FAR]
        dx, dy = random.Random(f"control-{prompt['seed']}").choice(shifts)
        text = f"{names[scene['subjects'][0]]}, {scene['colour']} background, {STYLE_PHRASES[scene['style']]}"
        cases.append(Case(scene, text, prompt["seed"], (x, y), (x + TOKEN * dx, y + TOKEN * dy)))
    return cases


def silhouette(atlas: Atlas, case: Case) -> np.ndarray:
    """Control image: the drawing in white at the shifted place, on black."""
    size = atlas.sizes["single"]["medium"]
    drawing = atlas.sprites[atlas.styles.index(case.scene["style"]), atlas.hexcodes.index(case.scene["subjects"][0])]
    cover = Image.fromarray(drawing[..., 3]).resize((size, size), Image.Resampling.BICUBIC)
    canvas = Image.new("L", (SIDE, SIDE))
    canvas.paste(cover, (case.shown[0] - size // 2, case.shown[1] - size // 2))
    return np.asarray(canvas.convert("RGB"))


def locate(judge: Judge, image: np.ndarray, case: Case) -> dict[str, bool]:
    """Whether the drawing is at the silhouette's place instead of the usual one, and whether it is the named one."""
    size = judge.atlas.sizes["single"]["medium"]
    style = judge.atlas.styles.index(case.scene["style"])
    subject = judge.atlas.hexcodes.index(case.scene["subjects"][0])
    colour = case.scene["colour"]
    shown, usual = (judge.distances(image, colour, *place, size) for place in (case.shown, case.usual))
    return {
        "where shown": bool(shown[style, subject] < usual[style, subject]),
        "subject there": bool(np.unravel_index(shown.argmin(), shown.shape)[1] == subject),
    }


def measure_control(engine: zimage_rt.Engine, folder: Path, count: int, save: Path | None = None) -> dict[str, float]:
    """Shares of the cases per control scale of `SCALES`."""
    atlas = Atlas.load(folder)
    judge, rows = Judge(atlas), []
    answers: dict[str, list[bool]] = {}
    for case in shifted_cases(atlas, folder, count):
        card = silhouette(atlas, case)
        row = [card]
        for scale in SCALES:
            result = engine.generate(case.prompt, seed=case.seed, control_image=card, control_scale=scale)
            row.append(result.images[0])
            for question, answer in locate(judge, row[-1], case).items():
                answers.setdefault(f"{question} at {scale:g}", []).append(answer)
        rows.append(np.concatenate(row, axis=1))
    _save(save, rows)
    return {name: float(np.mean(values)) for name, values in sorted(answers.items(), reverse=True)}


# --- the command ------------------------------------------------------------------------------------------------------


def _save(folder: Path | None, rows: list[np.ndarray]) -> None:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for number, row in enumerate(rows):
            Image.fromarray(row).save(folder / f"{number:03d}.png")


def _report(figures: dict[str, float], cases: int, output: Path | None) -> None:
    for name, value in figures.items():
        line = f"{value:6.2f} levels" if name.startswith("distance") else f"{100 * value:6.2f} %"
        typer.echo(f"{name:22s} {line}")
    typer.echo(f"{cases} cases")
    if output is not None:
        output.write_text(json.dumps({"cases": cases, "figures": figures}, indent=1) + "\n", encoding="utf-8")


Bundle = Annotated[Path, typer.Option(help="Bundle of zimage-nano.")]
Cases = Annotated[int, typer.Option("--cases", help="Number of prompts.")]
Backend = Annotated[str, typer.Option(help="Backend: onnxruntime, cuda, tensorrt or tensorrt_rtx.")]
Data = Annotated[Path, typer.Option(help="Folder of the judge's data.")]
Output = Annotated[Path | None, typer.Option("--json", help="File to write the figures to as JSON.")]


@app.command("lora")
def lora_command(
    bundle: Bundle,
    lora: Annotated[Path, typer.Option(help="LoRA that style_lora.py wrote.")],
    count: Cases = 100,
    backend: Backend = "onnxruntime",
    data: Data = DATA,
    save: Annotated[Path | None, typer.Option(help="Folder for images: without, at 0.5, at 1.")] = None,
    output: Output = None,
) -> None:
    """Judge the style LoRA."""
    figures = measure_lora(zimage_rt.Engine.load(bundle, backend=backend), lora, data, count, save)
    _report(figures, len(single_prompts(data, count)), output)


@app.command("control")
def control_command(
    bundle: Bundle,
    count: Cases = 100,
    backend: Backend = "onnxruntime",
    data: Data = DATA,
    save: Annotated[Path | None, typer.Option(help="Folder for images: control image, then each scale.")] = None,
    output: Output = None,
) -> None:
    """Judge the ControlNet; the bundle must be exported with `--controlnet`."""
    figures = measure_control(zimage_rt.Engine.load(bundle, backend=backend), data, count, save)
    _report(figures, len(single_prompts(data, count)), output)


if __name__ == "__main__":
    app()
