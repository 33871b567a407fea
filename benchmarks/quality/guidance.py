"""Measures the effect of guidance and negative prompts on a model's images, mainly the base model's.

    python -m zimage_rt.benchmarks.quality.guidance --bundle engines/nano-base --prompts 200 --svg guidance.svg

First it measures the judge's figures per guidance scale, on held-out prompts of single drawings and pairs; with
`--unseen`, in phrasings outside of the training data.

Then it measures negative prompts on properties that the prompt leaves open. An image is judged, the property that it
shows is named in the negative prompt, and it is drawn again from the same seed. Prompts name only a subject, to measure
`colour` and `style`, or only these two, to measure the `subject`. Any negative prompt changes the image, so a control
names something else.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from zimage_rt.benchmarks.quality.edits import STYLE_PHRASES, names_of
from zimage_rt.benchmarks.quality.judge import DATA, UNSEEN, Atlas, Judge, summarise
from zimage_rt.benchmarks.quality.judges import judges
from zimage_rt.benchmarks.quality.prompts import kind_of, read_prompts
from zimage_rt.benchmarks.systems.base import System, load_system

from zimage_rt.bundle.manifest import read_manifest

SCALES = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0)
KINDS = ("single", "pair")
FREE = 50  # prompts per open property
# Open property → parts of the prompt; open property → parts of the negative prompt. A style is named with a subject.
FREE_PROMPTS = {"subject": ("colour", "style"), "colour": ("subject",), "style": ("subject",)}
NAMING = {"subject": ("subject",), "colour": ("colour",), "style": ("subject", "style")}
# The judge's figures for these prompts → labels in the plot.
CURVES = {"subject": "subject, single", "subject_pair": "half of a pair", "style": "style", "colour": "colour"}
INK = {"subject": "#3b6ea8", "subject_pair": "#c1622d", "style": "#5b9a4c", "colour": "#777777"}

Prompt = dict[str, Any]


def chosen_prompts(folder: Path, count: int, kinds: tuple[str, ...] = KINDS) -> list[Prompt]:
    """The first prompts of these kinds, at 256 × 256; `KINDS` are in phrasings of the training data."""
    return [p for p in read_prompts(10**9, folder / "prompts.jsonl") if kind_of(p) in kinds][:count]


def measure_scales(
    system: System, folder: Path, prompts: list[Prompt], steps: int, processes: int | None = None
) -> dict[float, dict[str, float]]:
    """The judge's figures per guidance scale of `SCALES`."""
    captions, seeds = [p["caption"] for p in prompts], [p["seed"] for p in prompts]
    with judges(folder, processes) as judging:
        for scale in SCALES:
            images = system.generate(captions, seeds, num_inference_steps=steps, guidance_scale=scale)
            for prompt, image in zip(prompts, images, strict=True):
                judging.give(image, prompt["scene"])
        answers = iter(judging.answers())
    figures = {}
    for scale in SCALES:
        found = summarise([(prompt, next(answers)) for prompt in prompts])
        known = {name.removeprefix(UNSEEN): value for name, value in found.items()}
        figures[scale] = {name: value for name, value in known.items() if name in (*CURVES, "places")}
    return figures


def find_properties(judge: Judge, image: np.ndarray, scene: dict[str, Any]) -> dict[str, str]:
    """Finds `subject` (its code), `colour` and `style` in an image of a single drawing."""
    atlas, colour = judge.atlas, judge.background(image)
    table = judge.distances(image, colour, *atlas.places(scene)[0], atlas.sizes["single"][scene["size"]])
    style, subject = np.unravel_index(table.argmin(), table.shape)
    return {"subject": atlas.hexcodes[subject], "colour": colour, "style": atlas.styles[style]}


def prompt_of(scene: dict[str, Any], names: dict[str, str], *properties: str) -> str:
    """Prompt that names some of `subject`, `colour` and `style` of a scene."""
    phrases = {
        "subject": names[scene["subjects"][0]],
        "colour": f"{scene['colour']} background",
        "style": STYLE_PHRASES[scene["style"]],
    }
    return ", ".join(phrases[what] for what in properties)


def with_value(scene: dict[str, Any], what: str, value: str) -> dict[str, Any]:
    """A copy of the scene with another subject, colour or style."""
    return {**scene, **({"subjects": [value]} if what == "subject" else {what: value})}


def measure_negative(
    system: System, judge: Judge, prompts: list[Prompt], what: str, names: dict[str, str], steps: int, scale: float
) -> dict[str, float]:
    """Share of images that keep a property which the negative prompt names, and of a control that names another.

    Args:
        system: draws the images.
        judge: finds the property in the images.
        prompts: prompts of single drawings.
        what: the property: `subject`, `colour` or `style`.
        names: names of the subjects by code.
        steps: function evaluations.
        scale: guidance scale.
    """
    atlas = judge.atlas
    choices = {"subject": atlas.hexcodes, "colour": list(atlas.colours), "style": atlas.styles}[what]

    def draw(pairs: list[tuple[Prompt, str]]) -> list[dict[str, str]]:
        seen: dict[int, dict[str, str]] = {}
        for negative in sorted({negative for _, negative in pairs}):  # a call has one negative prompt
            numbers = [i for i, (_, own) in enumerate(pairs) if own == negative]
            part = [pairs[i][0] for i in numbers]
            texts = [prompt_of(p["scene"], names, *FREE_PROMPTS[what]) for p in part]
            options: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": scale}
            images = system.generate(texts, [p["seed"] for p in part], negative_prompt=negative, **options)
            seen |= {
                i: find_properties(judge, image, p["scene"]) for i, p, image in zip(numbers, part, images, strict=True)
            }
        return [seen[i] for i in range(len(pairs))]

    first = [found[what] for found in draw([(prompt, "") for prompt in prompts])]
    others = [
        random.Random(f"{what}-{prompt['seed']}").choice([choice for choice in choices if choice != found])
        for prompt, found in zip(prompts, first, strict=True)
    ]
    figures = {"drawn": float(len(prompts)), "different": float(len(set(first)))}
    for name, values in (("named", first), ("control", others)):
        negatives = [
            prompt_of(with_value(p["scene"], what, v), names, *NAMING[what])
            for p, v in zip(prompts, values, strict=True)
        ]
        seen = draw(list(zip(prompts, negatives, strict=True)))
        again = [now[what] == found for found, now in zip(first, seen, strict=True)]
        figures[f"seen again, {name}"] = float(np.mean(again))
        if what != "subject":
            right = [
                now["subject"] == prompt["scene"]["subjects"][0] for prompt, now in zip(prompts, seen, strict=True)
            ]
            figures[f"subject right, {name}"] = float(np.mean(right))
    return figures


def draw_svg(figures: dict[float, dict[str, float]], title: str) -> str:
    """SVG plot of the curves: guidance on the x axis, percent on the y axis."""
    width, height, margin = 460, 260, 36
    inner_w, inner_h = width - 2 * margin - 90, height - 2 * margin
    text = 'font-family="sans-serif" font-size="10" fill="#555"'

    def place(scale: float, share: float) -> tuple[float, float]:
        return margin + scale / max(figures) * inner_w, margin + (1 - share) * inner_h

    parts = [f'<text x="{margin}" y="20" font-family="sans-serif" font-size="12" fill="#222">{title}</text>']
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = place(0, share)
        parts.append(f'<line x1="{x}" y1="{y}" x2="{x + inner_w}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{x - 4}" y="{y + 4}" text-anchor="end" {text}>{100 * share:.0f} %</text>')
    for scale in figures:
        x, y = place(scale, 0)
        parts.append(f'<text x="{x:.1f}" y="{y + 14}" text-anchor="middle" {text}>{scale:g}</text>')
    for row, (name, label) in enumerate(CURVES.items()):
        points = [place(scale, found[name]) for scale, found in figures.items() if name in found]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{INK[name]}" stroke-width="1.5"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{INK[name]}"/>' for x, y in points]
        x, y = margin + inner_w + 12, margin + 14 * row + 10
        parts.append(f'<text x="{x}" y="{y}" font-family="sans-serif" font-size="10" fill="{INK[name]}">{label}</text>')
    body = "\n".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">\n{body}\n</svg>\n'


def main(
    bundle: Annotated[Path, typer.Option(help="Bundle of zimage-nano-base.")],
    count: Annotated[int, typer.Option("--prompts", help="Number of prompts, of all kinds together.")] = 200,
    unseen: Annotated[
        bool, typer.Option("--unseen", help="Measure guidance on phrasings outside of the training data.")
    ] = False,
    backend: Annotated[str, typer.Option(help="Backend: onnxruntime, cuda, tensorrt or tensorrt_rtx.")] = "onnxruntime",
    steps: Annotated[int | None, typer.Option(help="Function evaluations. By default the bundle's.")] = None,
    negative_scale: Annotated[float, typer.Option(help="Guidance scale for negative prompts.")] = 4.0,
    data: Annotated[Path, typer.Option(help="Folder of the judge's data.")] = DATA,
    processes: Annotated[int | None, typer.Option(help="Processes of the judge. By default one per core.")] = None,
    svg: Annotated[Path | None, typer.Option(help="SVG file for the plot.")] = None,
    output: Annotated[Path | None, typer.Option("--json", help="File to write the figures to as JSON.")] = None,
) -> None:
    """Print the figures at each guidance scale, then what negative prompts remove."""
    manifest = read_manifest(bundle)
    evaluations = steps or manifest.pipeline.num_inference_steps
    kinds = tuple(UNSEEN + kind for kind in KINDS) if unseen else KINDS
    system, prompts = load_system("zimage_rt", bundle=str(bundle), backend=backend), chosen_prompts(data, count, kinds)
    scales = measure_scales(system, data, prompts, evaluations, processes)
    for scale, figures in scales.items():
        typer.echo(f"guidance {scale:g}  " + "  ".join(f"{name} {100 * v:6.2f} %" for name, v in figures.items()))
    judge, names = Judge(Atlas.load(data)), names_of(data)
    negative = {}
    for what in FREE_PROMPTS:
        singles = chosen_prompts(data, min(count, FREE), ("single",))
        negative[what] = measure_negative(system, judge, singles, what, names, evaluations, negative_scale)
        counts = "{drawn:.0f} drawn, {different:.0f} different".format(**negative[what])
        shares = (f"{k} {100 * v:.2f} %" for k, v in negative[what].items() if k not in ("drawn", "different"))
        typer.echo(f"negative {what}: {counts}; {', '.join(shares)}")
    if svg is not None:
        asked = f"{len(prompts)} prompts{' in unseen phrasings' if unseen else ''}"
        svg.write_text(draw_svg(scales, f"{manifest.name}, {evaluations} evaluations, {asked}"), "utf-8")
    if output is not None:
        report = {
            "bundle": manifest.name,
            "backend": backend,
            "num_inference_steps": evaluations,
            "kinds": kinds,
            "prompts": len(prompts),
            "scales": scales,
            "negative_scale": negative_scale,
            "negative": negative,
        }
        output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
