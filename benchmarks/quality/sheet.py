"""Contact sheet of randomly chosen held-out prompts with the judge's verdicts, for the model card.

python -m zimage_rt.benchmarks.quality.sheet --bundle engines/nano --out samples.png --list samples.md
python -m zimage_rt.benchmarks.quality.sheet --bundle engines/nano --kinds unseen_single --only-wrong --out failures.png
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated, Any

import typer
from zimage_rt.benchmarks.quality.judge import DATA, canvas_name
from zimage_rt.benchmarks.quality.judges import judges
from zimage_rt.benchmarks.quality.prompts import kind_of, read_prompts
from zimage_rt.benchmarks.systems.base import load_system

from zimage_rt.image.contact_sheet import Section, SheetImage, draw_sheet

COLUMNS = 8
CELL = 112
WRONG = "wrong: "


def chosen_prompts(folder: Path, count: int, kinds: list[str] | None = None) -> list[dict[str, Any]]:
    """A fixed random sample of the prompts of 256 × 256, of these kinds if any are given."""
    prompts = [p for p in read_prompts(10**9, folder / "prompts.jsonl") if canvas_name(p["scene"]) == "256x256"]
    prompts = [p for p in prompts if not kinds or kind_of(p) in kinds]
    return random.Random("sheet").sample(prompts, min(count, len(prompts)))


def verdict(answers: dict[str, list[bool]]) -> str:
    """The judge's objections as text; empty if all answers are right."""
    wrong = [name.removeprefix("subject_") for name, values in answers.items() if not all(values)]
    return WRONG + ", ".join(wrong) if wrong else ""


def main(
    bundle: Annotated[Path, typer.Option(help="Bundle that draws the images.")],
    out: Annotated[Path, typer.Option(help="PNG file to write the sheet to.")],
    listing: Annotated[Path | None, typer.Option("--list", help="Markdown file to write the prompts to.")] = None,
    count: Annotated[int, typer.Option("--prompts", help=f"Number of prompts, a multiple of {COLUMNS}.")] = 64,
    kinds: Annotated[
        list[str] | None,
        typer.Option(help="Only prompts of this kind, e.g. unseen_single; may be repeated. By default all."),
    ] = None,
    only_wrong: Annotated[
        bool, typer.Option("--only-wrong", help="Only show images that the judge finds wrong.")
    ] = False,
    backend: Annotated[str, typer.Option(help="Backend: onnxruntime, cuda, tensorrt or tensorrt_rtx.")] = "onnxruntime",
    data: Annotated[Path, typer.Option(help="Folder of the judge's data.")] = DATA,
) -> None:
    """Draw the prompts, judge the images and write the sheet."""
    prompts = chosen_prompts(data, count, kinds)
    system = load_system("zimage_rt", bundle=str(bundle), backend=backend)
    images = system.generate([p["caption"] for p in prompts], [p["seed"] for p in prompts])
    with judges(data) as judging:
        for prompt, image in zip(prompts, images, strict=True):
            judging.give(image, prompt["scene"])
        drawn = list(zip(prompts, images, (verdict(answers) for answers in judging.answers()), strict=True))
    right = sum(not text for _, _, text in drawn)
    title = f"{len(drawn)} held-out prompts drawn by lot; all is right in {right}"
    if only_wrong:
        drawn = [cell for cell in drawn if cell[2]]
        title += ", and these are the others"
    cells = [
        SheetImage(image, f"{number}{' ' + text if text else ''}") for number, (_, image, text) in enumerate(drawn, 1)
    ]
    rows = [("", cells[i : i + COLUMNS]) for i in range(0, len(cells), COLUMNS)]
    draw_sheet([title], [Section("", None, rows, CELL)]).save(out)
    typer.echo(title)
    if listing is not None:
        lines = [
            f"{number}. {prompt['caption']}{f' — *{text}*' if text else ''}"
            for number, (prompt, _, text) in enumerate(drawn, 1)
        ]
        listing.write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    typer.run(main)
