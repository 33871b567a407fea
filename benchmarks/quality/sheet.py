"""A contact sheet of held-out prompts, drawn by lot and shown with what the judge says, for the model card.

python -m zimage_rt.benchmarks.quality.sheet --bundle engines/nano --out samples.png --list samples.md
python -m zimage_rt.benchmarks.quality.sheet --bundle engines/nano --kinds unseen_single --only-wrong --out failures.png
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated, Any

import typer
from zimage_rt.benchmarks.quality.__main__ import kind_of, read_prompts
from zimage_rt.benchmarks.quality.judge import DATA, canvas_name
from zimage_rt.benchmarks.quality.judges import judges
from zimage_rt.benchmarks.systems.base import load_system

from zimage_rt.image.contact_sheet import Section, SheetImage, draw_sheet

COLUMNS = 8
CELL = 112
WRONG = "wrong: "


def chosen_prompts(folder: Path, count: int, kinds: list[str] | None = None) -> list[dict[str, Any]]:
    """Prompts of 256 × 256, of these kinds alone if any are named, drawn by lot; the lot is always the same."""
    prompts = [p for p in read_prompts(10**9, folder / "prompts.jsonl") if canvas_name(p["scene"]) == "256x256"]
    prompts = [p for p in prompts if not kinds or kind_of(p) in kinds]
    return random.Random("sheet").sample(prompts, min(count, len(prompts)))


def verdict(answers: dict[str, list[bool]]) -> str:
    """What the judge finds wrong, or nothing."""
    wrong = [name.removeprefix("subject_") for name, values in answers.items() if not all(values)]
    return WRONG + ", ".join(wrong) if wrong else ""


def main(
    bundle: Annotated[Path, typer.Option(help="What draws.")],
    out: Annotated[Path, typer.Option(help="The sheet, a PNG.")],
    listing: Annotated[Path | None, typer.Option("--list", help="The prompts as a Markdown list.")] = None,
    count: Annotated[int, typer.Option("--prompts", help=f"How many, a multiple of {COLUMNS}.")] = 64,
    kinds: Annotated[list[str] | None, typer.Option(help="Only these, e.g. unseen_single.")] = None,
    only_wrong: Annotated[bool, typer.Option("--only-wrong", help="Leave out what is right.")] = False,
    backend: Annotated[str, typer.Option(help="Which backend draws.")] = "onnxruntime",
    data: Annotated[Path, typer.Option(help="The judge's data.")] = DATA,
) -> None:
    """Draw the prompts, judge the pictures, and write the sheet."""
    prompts = chosen_prompts(data, count, kinds)
    system = load_system("zimage_rt", bundle=str(bundle), backend=backend)
    pictures = system.generate([p["caption"] for p in prompts], [p["seed"] for p in prompts])
    with judges(data) as judging:
        for prompt, picture in zip(prompts, pictures, strict=True):
            judging.give(picture, prompt["scene"])
        drawn = list(zip(prompts, pictures, (verdict(answers) for answers in judging.answers()), strict=True))
    right = sum(not text for _, _, text in drawn)
    title = f"{len(drawn)} held-out prompts drawn by lot; all is right in {right}"
    if only_wrong:
        drawn = [cell for cell in drawn if cell[2]]
        title += ", and these are the others"
    cells = [
        SheetImage(picture, f"{number}{' ' + text if text else ''}")
        for number, (_, picture, text) in enumerate(drawn, 1)
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
