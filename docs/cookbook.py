"""Writes the cookbook: every recipe below is run, and its own lines and picture go on the page.

.venv/bin/python docs/cookbook.py             writes docs/cookbook.md and docs/cookbook/*.png
.venv/bin/python docs/cookbook.py --out DIR   the same elsewhere, which is how a test holds the page to the code
"""

from __future__ import annotations

import argparse
import inspect
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

import zimage_rt

ROOT = Path(__file__).parent.parent
Recipe = Callable[[zimage_rt.Engine], list[np.ndarray]]
RECIPES: dict[str, Recipe] = {}


def recipe(title: str) -> Callable[[Recipe], Recipe]:
    """Put a function on the page; it returns the pictures to show side by side."""

    def add(function: Recipe) -> Recipe:
        RECIPES[title] = function
        return function

    return add


@recipe("A prompt, in any language")
def prompt(engine: zimage_rt.Engine) -> list[np.ndarray]:
    """The same seed gives the same picture, on every machine; several prompts run as one batch."""
    result = engine.generate(
        ["a red apple, white background", "一只企鹅，绿色背景", "一个 house，purple background"], seed=3
    )
    return list(result.images)


@recipe("Image to image")
def image_to_image(engine: zimage_rt.Engine) -> list[np.ndarray]:
    """Begin from a picture. `strength` says how far to go from it: 0.3 retouches, 1 forgets."""
    cat = engine.generate("a cat, blue background", seed=5).images[0]
    pictures = [cat]
    for strength in (0.4, 0.7, 1.0):
        again = engine.generate("a panda, green background", image=cat, strength=strength, seed=5)
        pictures.append(again.images[0])
    return pictures


@recipe("Inpainting")
def inpaint(engine: zimage_rt.Engine) -> list[np.ndarray]:
    """Draw anew where the mask is white; where it is black the picture keeps its bytes."""
    before = engine.generate("a cat on the left and a house on the right, purple background", seed=3).images[0]
    mask = np.zeros((256, 256), np.uint8)
    mask[:, :128] = 255
    after = engine.generate(
        "a penguin on the left and a house on the right, purple background",
        image=before,
        mask=mask,
        mask_feather=4,
        strength=1.0,
        seed=8,
    ).images[0]
    assert (after[:, 150:] == before[:, 150:]).all()
    return [before, np.stack([mask] * 3, axis=-1), after]


@recipe("Guidance and a negative prompt")
def guidance(engine: zimage_rt.Engine) -> list[np.ndarray]:
    """`guidance_scale` steers towards the prompt and away from the negative one; 0, Turbo's own setting, is none."""
    pictures = []
    for scale in (0.0, 1.0, 3.0):
        result = engine.generate("a panda", "blue background", guidance_scale=scale, seed=2)
        pictures.append(result.images[0])
    return pictures


@recipe("Samplers and schedules")
def samplers(engine: zimage_rt.Engine) -> list[np.ndarray]:
    """ComfyUI's names. Heun evaluates the model twice a step; every sampler is a table for one and the same loop."""
    pictures = []
    for sampler, schedule in (("euler", "simple"), ("heun", "simple"), ("dpmpp_2m", "karras"), ("euler", "beta")):
        result = engine.generate("a red apple, green background", sampler=sampler, schedule=schedule, seed=4)
        pictures.append(result.images[0])
    return pictures


@recipe("Two passes")
def two_passes(engine: zimage_rt.Engine) -> list[np.ndarray]:
    """Draft at the size that a model knows best, then draw over it larger; `scale=1.0` refines at the same size."""
    draft = engine.generate("a house, blue background", seed=5)
    again = zimage_rt.SecondPass(scale=1.5, strength=0.3, num_inference_steps=12)
    larger = engine.generate("a house, blue background", seed=5, second_pass=again)
    return [draft.images[0], larger.images[0]]


@recipe("A session")
def session(engine: zimage_rt.Engine) -> list[np.ndarray]:
    """Turns that build on one another, and can be taken back."""
    work = zimage_rt.Session(engine)
    pictures = [work.generate("a cat on the left and a house on the right, purple background", seed=3).images[0]]
    mask = np.zeros((256, 256), np.uint8)
    mask[:, 128:] = 255
    edited = work.edit("a cat on the left and an apple on the right, purple background", mask=mask, seed=9)
    pictures.append(edited.images[0])
    pictures.append(work.refine(0.3).images[0])
    work.undo()
    return pictures


@recipe("Watching a picture come")
def previews(engine: zimage_rt.Engine) -> list[np.ndarray]:
    """A callback sees every step, may look at it through the tiny VAE, and may cancel by returning False."""
    seen = []

    def look(info: zimage_rt.StepInfo) -> None:
        if info.step % 2 == 1:
            seen.append(info.preview()[0])

    engine.generate("a panda, white background", seed=1, callback=look)
    return seen


def side_by_side(pictures: list[np.ndarray]) -> Image.Image:
    """One strip, at the height of the tallest, with a white gap."""
    gap, height = 8, max(picture.shape[0] for picture in pictures)
    strip = Image.new("RGB", (sum(picture.shape[1] + gap for picture in pictures) - gap, height), "white")
    left = 0
    for picture in pictures:
        strip.paste(Image.fromarray(picture), (left, 0))
        left += picture.shape[1] + gap
    return strip


def lines_of(function: Recipe) -> tuple[str, str]:
    """A recipe's docstring, and its body as it stands here."""
    source = textwrap.dedent(inspect.getsource(function))
    _, _, body = source.partition('"""')
    _, _, body = body.partition('"""')
    kept = [line for line in textwrap.dedent(body.lstrip("\n")).splitlines() if not line.startswith("return ")]
    return inspect.getdoc(function) or "", "\n".join(kept).strip()


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="docs/cookbook.py", description=__doc__)
    parser.add_argument("--bundle", type=Path, default=ROOT / "engines" / "nano")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    arguments = parser.parse_args(argv)
    engine = zimage_rt.Engine.load(arguments.bundle)
    folder = arguments.out / "cookbook"
    folder.mkdir(parents=True, exist_ok=True)
    page = [
        "# Cookbook",
        "",
        "Written by `docs/cookbook.py`, which runs what it shows. The pictures are those of "
        "[zimage-nano](../checkpoints/zimage-nano/README.md), our 38 MB judge, which draws like one.",
        "",
        "```python",
        "import numpy as np",
        "import zimage_rt",
        "",
        'engine = zimage_rt.Engine.load("engines/nano")',
        "```",
    ]
    for title, function in RECIPES.items():
        text, code = lines_of(function)
        name = f"{function.__name__}.png"
        side_by_side(function(engine)).save(folder / name, optimize=True)
        page += ["", f"## {title}", text, "", "```python", code, "```", "", f"![{title}](cookbook/{name})"]
    (arguments.out / "cookbook.md").write_text("\n".join(page) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
