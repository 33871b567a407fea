"""Writes the cookbook: every recipe below is run, and its own lines and image go on the page.

.venv/bin/python docs/cookbook.py             writes docs/cookbook.md and docs/cookbook/*.png
.venv/bin/python docs/cookbook.py --out DIR   the same elsewhere, which is how a test holds the page to the code

A recipe's arguments are the engines that it wants, by name (`ENGINES`); bundles other than nano's own are exported into
a temporary folder. A recipe whose checkpoint or adapter is not in the repository is left out, with a line on stderr.
Each recipe names the scenes that its images must show, on every machine: `tests/docs/test_cookbook.py` judges them.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import os
import shlex
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from zimage_rt.export.recipe import read_recipe

import zimage_rt

ROOT = Path(__file__).parent.parent
CYANOTYPE = Path("checkpoints/zimage-nano-cyanotype/cyanotype.safetensors")
# What a recipe may ask for → the recipe of its bundle, beside which the page says that it is.
ENGINES = {"engine": "nano", "base": "nano-base", "controlled": "nano-control"}
Recipe = Callable[..., list[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Scene:
    """What one image of a recipe shows, in the words of the judge (`benchmarks/quality/judge.py`).

    Attributes:
        image: which one, from 0.
        subjects: one drawing's name, or those of the left and the right one.
        colour: the background's; None if the prompt leaves it open.
        moved: pixels to the right and down by which a single drawing is away from the middle.
        box: left, top and side of a square inside of the image, where that is a sheet of several.
    """

    image: int
    subjects: tuple[str, ...]
    colour: str | None = None
    moved: tuple[int, int] = (0, 0)
    box: tuple[int, int, int] | None = None


def singles(*words: tuple[str, str | None] | None) -> tuple[Scene, ...]:
    """Scenes of one drawing each, as (name, colour), for the images in order; None for one that shows no scene."""
    return tuple(Scene(i, (word[0],), word[1]) for i, word in enumerate(words) if word is not None)


@dataclasses.dataclass(frozen=True)
class Shell:
    """A recipe of the command line, run in an empty folder.

    Attributes:
        text: what stands above it.
        lines: commands of `zimage`, one a line.
        show: the images that they leave, as a pattern.
        scenes: what the images show.
        table: a file that is there before, as its name, text and encoding.
        sheet: an Excel file that is there before, as its name and its rows.
    """

    text: str
    lines: str
    show: str
    scenes: tuple[Scene, ...]
    table: tuple[str, str, str] | None = None
    sheet: tuple[str, tuple[tuple[str | float, ...], ...]] | None = None


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A recipe that has run.

    Attributes:
        name: its image's on the page.
        lines: its section of the page.
        images: uint8 [height, width, 3], from left to right.
        scenes: what they must show.
    """

    name: str
    lines: list[str]
    images: list[np.ndarray]
    scenes: tuple[Scene, ...]


RECIPES: dict[str, Recipe] = {}
SCENES: dict[str, tuple[Scene, ...]] = {}
SHELLS: dict[str, Shell] = {}
NEEDS: dict[str, Path] = {}  # by title: a file without which there is nothing to show


def recipe(title: str, scenes: Sequence[Scene], needs: Path | None = None) -> Callable[[Recipe], Recipe]:
    """Put a function on the page; it returns the images to show side by side."""

    def add(function: Recipe) -> Recipe:
        RECIPES[title], SCENES[title] = function, tuple(scenes)
        if needs is not None:
            NEEDS[title] = needs
        return function

    return add


@recipe("A prompt, in any language", singles(("red apple", "white"), ("penguin", "green"), ("house", "purple")))
def prompt(engine: zimage_rt.Engine) -> list[np.ndarray]:
    """The same seed gives the same image: to the byte on one machine, but for rounding on another. Several prompts
    run as one batch."""
    result = engine.generate(
        ["a red apple, white background", "一只企鹅，绿色背景", "一个 house，purple background"], seed=3
    )
    return list(result.images)


@recipe("Image to image", singles(("cat", "blue"), ("panda", "blue"), ("panda", "blue"), ("panda", "green")))
def image_to_image(engine: zimage_rt.Engine) -> list[np.ndarray]:
    """Begin from an image. `strength` says how far to go from it: 0.3 retouches; 1, or more than
    1 − 1/steps, ignores it."""
    cat = engine.generate("a cat, blue background", seed=5).images[0]
    images = [cat]
    for strength in (0.4, 0.7, 1.0):
        again = engine.generate("a panda, green background", image=cat, strength=strength, seed=5)
        images.append(again.images[0])
    return images


@recipe("Images of another shape", singles(("rocket", "orange"), ("rocket", "orange"), None, ("rocket", "orange")))
def shapes(engine: zimage_rt.Engine) -> list[np.ndarray]:
    """An image of any size begins a request: `fit` crops, pads or stretches it. EXIF orientation is honoured, and what
    is transparent is white. The first image is the one given; a low `strength` leaves the others nearly as fitted."""
    wide = engine.generate("a rocket, orange background", height=192, width=320, seed=5).images[0]
    images = [wide]
    for fit in ("crop", "pad", "stretch"):
        result = engine.generate(
            "a rocket, orange background", image=wide, height=256, width=256, fit=fit, strength=0.2, seed=5
        )
        images.append(result.images[0])
    return images


@recipe("Inpainting", [Scene(0, ("cat", "house"), "purple"), Scene(2, ("penguin", "house"), "purple")])
def inpaint(engine: zimage_rt.Engine) -> list[np.ndarray]:
    """Draw anew where the mask is white; where it is black the image keeps its bytes."""
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


@recipe("Guidance and a negative prompt", singles(("panda", None), ("panda", None), ("panda", None)))
def guidance(base: zimage_rt.Engine) -> list[np.ndarray]:
    """`guidance_scale` steers towards the prompt and away from the negative one, as diffusers does:
    `pred = positive + scale * (positive - negative)`; 0, Turbo's own setting, is none. Base models want some, because
    their captions left things out and some were wrong. What a prompt leaves open (here the background: none said, at
    0 and 2) a negative prompt can exclude; much guidance exaggerates."""
    images = []
    for scale, negative in ((0.0, ""), (2.0, ""), (2.0, "white background"), (6.0, "a panda, noto style")):
        result = base.generate("a panda", negative, guidance_scale=scale, seed=5)
        images.append(result.images[0])
    return images


@recipe("Guidance that changes", singles(*4 * [("penguin", "yellow")]))
def dynamic_guidance(base: zimage_rt.Engine) -> list[np.ndarray]:
    """Too much guidance exaggerates: here 8, and then the same with each remedy.

    - `cfg_truncation` ends guidance where the timestep, 1 - sigma, exceeds it.
    - `cfg_normalization` limits the guided prediction's norm to that multiple of the positive one's.
    - `dynamic_cfg` = d, from 0 to 1, makes the scale depend on the prompt's n tokens and on the step: at sigma it is
      `guidance_scale * (1 + d * (min(n / 128, 1) - 1/2)) * (1 - d * (1 - sigma))`, so that long prompts steer more, and
      steering eases off as the image settles.
    """
    images = []
    for remedy in ({}, {"cfg_truncation": 0.5}, {"cfg_normalization": 1.0}, {"dynamic_cfg": 1.0}):
        result = base.generate("a penguin, yellow background", guidance_scale=8.0, seed=2, **remedy)
        images.append(result.images[0])
    return images


@recipe("Samplers and schedules", singles(*4 * [("red apple", "green")]))
def samplers(engine: zimage_rt.Engine) -> list[np.ndarray]:
    """ComfyUI's names give its numbers; those of diffusers begin with `diffusers_` ([samplers.md](samplers.md) has the
    list). The first is the default, the second the Z-Image template's, the last adds noise in every step."""
    images = []
    ways = (
        ("euler", "diffusers_simple"),
        ("res_multistep", "simple"),
        ("dpmpp_2m", "karras"),
        ("euler_ancestral", "beta"),
    )
    for sampler, schedule in ways:
        result = engine.generate("a red apple, green background", sampler=sampler, schedule=schedule, seed=4)
        images.append(result.images[0])
    return images


@recipe("Two passes", singles(*4 * [("house", "blue")]))
def two_passes(engine: zimage_rt.Engine) -> list[np.ndarray]:
    """Draft at the size that a model knows best, then draw over it: `scale=1.0` refines at the same size, more draws
    larger, from the image or, with more strength, from the latents."""
    images = [engine.generate("a house, blue background", seed=5).images[0]]
    for again in (
        zimage_rt.SecondPass(scale=1.0, strength=0.3, num_inference_steps=12),
        zimage_rt.SecondPass(scale=1.5, strength=0.3, num_inference_steps=12, method="pixel"),
        zimage_rt.SecondPass(scale=1.5, strength=0.6, num_inference_steps=12, method="latent"),
    ):
        images.append(engine.generate("a house, blue background", seed=5, second_pass=again).images[0])
    return images


@recipe("Decoding in tiles", singles(*2 * [("red apple", "cyan")]))
def tiles(engine: zimage_rt.Engine) -> list[np.ndarray]:
    """`vae_tile` decodes overlapping squares of so many pixels and blends them, for sizes that do not fit in
    memory. The third image is ten times the difference."""
    options = {"seed": 6, "height": 384, "width": 384}
    whole = engine.generate("a red apple, cyan background", **options).images[0]
    tiled = engine.generate("a red apple, cyan background", vae_tile=256, **options).images[0]
    difference = np.abs(whole.astype(int) - tiled)
    return [whole, tiled, np.minimum(10 * difference, 255).astype(np.uint8)]


@recipe("A style as a LoRA", singles(("panda", "green")), needs=CYANOTYPE)
def lora(engine: zimage_rt.Engine) -> list[np.ndarray]:
    """Put on and taken off a live engine, in the layouts of diffusers and PEFT, kohya and ComfyUI, several at once with
    their weights; without any, the weights are the bundle's to the byte. This one makes cyanotypes."""
    style = engine.load_lora("checkpoints/zimage-nano-cyanotype/cyanotype.safetensors")
    images = []
    for weight in (0.0, 0.5, 1.0):
        engine.set_loras({style: weight})
        images.append(engine.generate("a panda, green background", seed=5).images[0])
    engine.unload_lora(style)
    return images


@recipe(
    "Following a control image",
    [
        Scene(1, ("red apple",), "blue"),
        Scene(2, ("red apple",), "blue", moved=(48, -48)),
        Scene(3, ("red apple",), "blue", moved=(48, -48)),
    ],
)
def control(engine: zimage_rt.Engine, controlled: zimage_rt.Engine) -> list[np.ndarray]:
    """A ControlNet says what a prompt cannot: this one puts things where white silhouettes stand on black. The
    silhouette is cut out of another image and moved; then `control_scale` is 0, 0.75 and 1."""
    apple = engine.generate("a red apple, green background", seed=4).images[0]
    inside = np.abs(apple.astype(int) - apple[4, 4]).max(axis=-1) > 60
    card = np.repeat(np.roll(inside, (-48, 48), axis=(0, 1))[..., None], 3, axis=-1).astype(np.uint8) * 255
    images = [card]
    for scale in (0.0, 0.75, 1.0):
        result = controlled.generate("a red apple, blue background", control_image=card, control_scale=scale, seed=7)
        images.append(result.images[0])
    return images


@recipe(
    "A session",
    [Scene(i, ("cat", right), "purple") for i, right in enumerate(("house", "red apple", "red apple"))],
)
def session(engine: zimage_rt.Engine) -> list[np.ndarray]:
    """Turns that build on one another, and can be taken back."""
    work = zimage_rt.Session(engine)
    images = [work.generate("a cat on the left and a house on the right, purple background", seed=3).images[0]]
    mask = np.zeros((256, 256), np.uint8)
    mask[:, 128:] = 255
    edited = work.edit("a cat on the left and an apple on the right, purple background", mask=mask, seed=9)
    images.append(edited.images[0])
    images.append(work.refine(0.3).images[0])
    work.undo()
    return images


@recipe("A session with a model for each task", singles(*2 * [("rabbit", "pink")]))
def session_of_models(engine: zimage_rt.Engine, base: zimage_rt.Engine) -> list[np.ndarray]:
    """Turbo drafts, Base draws the final, each with its own evaluations and guidance: the session picks by the task.
    Base wants to be told the style; what is left out may be anything to it."""
    work = zimage_rt.Session({"draft": engine, "final": base})
    images = [work.generate("a rabbit, pink background, flat style", seed=3).images[0], work.refine(0.6).images[0]]
    assert [turn.engine for turn in work.turns] == ["draft", "final"]
    return images


@recipe("Watching an image come", singles(None, None, None, ("panda", "white")))
def previews(engine: zimage_rt.Engine) -> list[np.ndarray]:
    """A callback sees every step, may look at it through the tiny VAE, and may cancel by returning False."""
    seen = []

    def look(info: zimage_rt.StepInfo) -> None:
        if info.step % 2 == 1:
            seen.append(info.preview()[0])

    engine.generate("a panda, white background", seed=1, callback=look)
    return seen


SHELLS["A sheet of settings"] = Shell(
    "Function evaluations across, guidance down, and below what the latents held after each step.",
    'zimage explain engines/nano -p "a panda, green background" --steps 1,2,4,8 --guidance 0,2 --seed 3 \\\n'
    "  --cell 112 --no-times -o sheet.png",
    "sheet.png",
    # The last column, and the last image of the first strip.
    tuple(Scene(0, ("panda",), "green", box=box) for box in ((492, 112, 112), (492, 248, 112), (796, 420, 88))),
)
SHELLS["A batch from a spreadsheet"] = Shell(
    "Columns are request fields, or words for the template; CSV as Excel writes it in Chinese (GBK, or UTF-8 with its "
    "mark) and JSON lines. Killed, the same command goes on where it stopped.",
    'zimage batch animals.csv -b engines/nano -o out --template "一只{animal}，{colour}背景"',
    "out/*.png",
    singles(("panda", "blue"), ("penguin", "green"), ("fox", "white")),
    ("animals.csv", "animal,colour,seed\n熊猫,蓝色,3\n企鹅,绿色,4\n狐狸,白色,5\n", "gbk"),
)
SHELLS["Goods of an Excel sheet"] = Shell(
    "The first sheet of an .xlsx file (extra `xlsx`), or another with `--sheet`. Column names are also understood in "
    "Chinese. `--name` names the files by columns; two rows of one name are refused before anything is drawn. The "
    "other columns are kept in `out/journal.jsonl`, beside the files' names. A row that is added or changed later is "
    "drawn alone by the same command; the others stay, also where only their price changes.",
    'zimage batch goods.xlsx -b engines/nano -o out --name "{SKU}.png"',
    "out/*.png",
    singles(("red apple", "white"), ("rocket", "orange"), ("house", "purple")),
    sheet=(
        "goods.xlsx",
        (
            ("SKU", "品名", "价格", "提示词", "种子"),
            ("FR-0107", "苹果", 4.5, "一个红苹果，白色背景", 3),
            ("TY-2210", "火箭模型", 129, "一个火箭，橙色背景", 5),
            ("TY-2214", "玩具屋", 89.9, "一个房子，紫色背景", 3),
        ),
    ),
)
SHELLS["The same image again"] = Shell(
    "An image holds its whole request. `--like` repeats its pixels to the byte on the same machine and backend; "
    "options given beside it come first.",
    'zimage generate engines/nano -p "a fox, yellow background" --seed 9 -o first.png\n'
    "zimage generate engines/nano --like first.png -o second.png\n"
    'zimage generate engines/nano --like first.png -p "an owl, yellow background" -o third.png',
    "*.png",
    singles(("fox", "yellow"), ("fox", "yellow"), ("owl", "yellow")),
)


def side_by_side(images: list[np.ndarray]) -> Image.Image:
    """One strip, at the height of the tallest, with a white gap."""
    gap, height = 8, max(image.shape[0] for image in images)
    strip = Image.new("RGB", (sum(image.shape[1] + gap for image in images) - gap, height), "white")
    left = 0
    for image in images:
        strip.paste(Image.fromarray(image), (left, 0))
        left += image.shape[1] + gap
    return strip


def lines_of(function: Recipe) -> tuple[str, str]:
    """A recipe's docstring, and its body as it stands here."""
    source = textwrap.dedent(inspect.getsource(function))
    _, _, body = source.partition('"""')
    _, _, body = body.partition('"""')
    kept = [line for line in textwrap.dedent(body.lstrip("\n")).splitlines() if not line.startswith("return ")]
    return inspect.getdoc(function) or "", "\n".join(kept).strip()


class Bundles:
    """The engines of the recipes, loaded once, by the names of `ENGINES`."""

    def __init__(self, nano: Path, scratch: Path) -> None:
        self._paths, self._scratch = {"engine": nano}, scratch
        self._engines: dict[str, zimage_rt.Engine] = {}

    def missing(self, name: str) -> Path | None:
        """A file of the engine's recipe that is not here."""
        wanted = read_recipe(ROOT / "engines" / f"{ENGINES[name]}.toml")
        return next((path for path in (wanted.checkpoint, *wanted.parts.values()) if not path.exists()), None)

    def path(self, name: str) -> Path:
        """A bundle's folder; it is exported if it is not here."""
        if name not in self._paths:
            from zimage_rt.export.bundle import export  # torch loads here

            wanted = read_recipe(ROOT / "engines" / f"{ENGINES[name]}.toml")
            self._paths[name] = self._scratch / ENGINES[name]
            export(dataclasses.replace(wanted, out=self._paths[name], vae=("tiny",), parity=False))
        return self._paths[name]

    def engine(self, name: str) -> zimage_rt.Engine:
        """An engine."""
        if name not in self._engines:
            self._engines[name] = zimage_rt.Engine.load(self.path(name))
        return self._engines[name]


def run_shell(shell: Shell, bundles: Bundles) -> list[np.ndarray]:
    """Run a recipe's commands and read what they leave. Raises CalledProcessError."""
    with tempfile.TemporaryDirectory() as folder:
        if shell.table is not None:
            name, text, encoding = shell.table
            (Path(folder) / name).write_text(text, encoding)
        if shell.sheet is not None:
            write_sheet(Path(folder) / shell.sheet[0], shell.sheet[1])
        for line in shell.lines.replace("\\\n", "").splitlines():
            words = [str(bundles.path("engine").resolve()) if w == "engines/nano" else w for w in shlex.split(line)]
            subprocess.run([sys.executable, "-m", "zimage_rt.cli.main", *words[1:]], cwd=folder, check=True)
        return [np.asarray(Image.open(path).convert("RGB")) for path in sorted(Path(folder).glob(shell.show))]


def write_sheet(path: Path, rows: Sequence[Sequence[str | float]]) -> None:
    """An Excel file of one sheet."""
    import openpyxl

    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    book.save(path)


def header() -> list[str]:
    """The page's beginning."""
    loads = [
        f'{name} = zimage_rt.Engine.load("engines/{bundle}")  # zimage-export engines/{bundle}.toml'
        for name, bundle in ENGINES.items()
    ]
    return [
        "# Cookbook",
        "",
        "Written by `docs/cookbook.py`, which runs what it shows. The images are those of "
        "[zimage-nano](../checkpoints/zimage-nano/README.md), our small judge.",
        "",
        "```python",
        "import numpy as np",
        "import zimage_rt",
        "",
        *loads,
        "```",
    ]


def section(title: str, text: str, code: str, language: str, name: str) -> list[str]:
    """A recipe on the page."""
    return ["", f"## {title}", text, "", f"```{language}", code, "```", "", f"![{title}](cookbook/{name}.png)"]


def draw(nano: Path, scratch: Path) -> Iterator[Drawn]:
    """Run the recipes, from the repository's root, where their paths begin.

    Args:
        nano: the bundle of zimage-nano.
        scratch: a folder for the other bundles.
    """
    bundles = Bundles(nano.resolve(), scratch)
    os.chdir(ROOT)
    for title, function in RECIPES.items():
        names = list(inspect.signature(function).parameters)
        needed = [bundles.missing(name) for name in names] + [NEEDS.get(title)]
        absent = next((path for path in needed if path is not None and not path.exists()), None)
        if absent is not None:
            print(f"left out: {title}: there is no {absent}", file=sys.stderr)
            continue
        text, code = lines_of(function)
        images = function(*(bundles.engine(name) for name in names))
        lines = section(title, text, code, "python", function.__name__)
        yield Drawn(function.__name__, lines, images, SCENES[title])
    for title, shell in SHELLS.items():
        name = title.lower().replace(" ", "_")
        lines = section(title, shell.text, shell.lines, "sh", name)
        if shell.table is not None:
            file, content, encoding = shell.table
            lines[-2:-2] = ["", f"`{file}`, in {encoding.upper()}:", "```", content.strip(), "```"]
        if shell.sheet is not None:
            file, rows = shell.sheet
            content = "\n".join(" | ".join(map(str, row)) for row in rows)
            lines[-2:-2] = ["", f"`{file}`, its cells:", "```", content, "```"]
        yield Drawn(name, lines, run_shell(shell, bundles), shell.scenes)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="docs/cookbook.py", description=__doc__)
    parser.add_argument("--bundle", type=Path, default=ROOT / "engines" / "nano")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    arguments = parser.parse_args(argv)
    folder = arguments.out.resolve() / "cookbook"
    folder.mkdir(parents=True, exist_ok=True)
    page = header()
    with tempfile.TemporaryDirectory() as scratch:
        for drawn in draw(arguments.bundle, Path(scratch)):
            side_by_side(drawn.images).save(folder / f"{drawn.name}.png", optimize=True)
            page += drawn.lines
    (folder.parent / "cookbook.md").write_text("\n".join(page) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
