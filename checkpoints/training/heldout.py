"""Write the judge's data: the atlas, the geometry of scenes, and the held-out prompts.

python heldout.py --atlas atlas.npz --out ../../benchmarks/quality/data
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np
import spelling
from captions import CaptionWriter
from corpus import MAX_TOKENS
from phrases import COLOURS, STYLE_NAMES
from PIL import Image
from scenes import CANVASES, DRAWING, LAYOUTS, centres, held_out_scene, subjects, text_top
from tokenizer import cached, chat

SIDE = 64
# One round of prompts; the file repeats it, so that any beginning of the file is a fair sample of those on
# 256 × 256. The other canvases' come behind them.
ROUND = [
    ("single", "zh", False), ("left_right", "en", False), ("single", "en", True), ("word", "zh", False),
    ("left_right", "zh", True), ("single", "en", False), ("top_bottom", "zh", False), ("sign", "en", False),
    ("top_bottom", "en", True), ("single", "zh", False), ("left_right", "zh", False), ("single", "zh", True),
    ("word", "en", False), ("left_right", "en", True), ("top_bottom", "en", False), ("single", "en", False),
    ("top_bottom", "zh", True), ("sign", "zh", False), ("single", "mixed", False), ("pair", "mixed", False),
]  # fmt: skip
OTHER_ROUND = [("single", "zh"), ("pair", "en"), ("word", "zh"), ("single", "en"), ("pair", "zh"), ("sign", "en")]
ROUNDS = 250  # so that every line of figures can have 500 prompts


def shrink(sprite: np.ndarray) -> np.ndarray:
    """Resize a drawing with premultiplied alpha, so that edges keep their colour."""
    image = Image.fromarray(sprite).convert("RGBa").resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(image.convert("RGBA"))


def plan() -> list[tuple[str, str, bool, int]]:
    """Return layout, language, unseen and canvas of every prompt."""
    turns = range(ROUNDS)
    wanted = [(turn, *kind, 0) for turn in turns for kind in ROUND]
    wanted += [
        (t, layout, language, False, 1 + t % 3) for t in turns[: ROUNDS // 2] for layout, language in OTHER_ROUND
    ]
    planned = []
    for turn, layout, language, unseen, canvas in wanted:
        fitting = [n for n in ("left_right", "top_bottom") if centres(n, *CANVASES[canvas])]
        name = fitting[turn // 3 % len(fitting)] if layout == "pair" else layout
        planned.append((name, language, unseen, canvas))
    return planned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--atlas", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    arrays = np.load(arguments.atlas)
    sprites = arrays["sprites"][:, : len(subjects())]
    small = np.stack([np.stack([shrink(s) for s in style]) for style in sprites])
    np.savez_compressed(arguments.out / "atlas.npz", sprites=small, glyphs=arrays["glyphs"])
    meta = {
        "hexcodes": [s.hexcode for s in subjects()],
        "names": [s.english[0] for s in subjects()],
        "styles": STYLE_NAMES,
        "colours": {name: rgb for name, (rgb, _, _) in COLOURS.items()},
        "canvases": {f"{w}x{h}": {n: centres(n, w, h) for n in LAYOUTS} for w, h in CANVASES},
        "sizes": {n: {"medium": DRAWING} for n in LAYOUTS},
        "text": {
            "alphabet": spelling.GLYPHS,
            "cells": {"latin": spelling.LATIN_WIDTH, "han": spelling.HAN_WIDTH},
            "tops": {f"{w}x{h}": {n: text_top(n, h) for n in ("word", "sign")} for w, h in CANVASES},
        },
    }
    text = json.dumps(meta, ensure_ascii=False, indent=1)
    (arguments.out / "scenes.json").write_text(text + "\n", "utf-8")
    rng, writer, lines = random.Random("held-out"), CaptionWriter(), []
    for number, (layout, language, unseen, canvas) in enumerate(plan()):
        scene = held_out_scene(rng, layout, canvas)
        while True:
            caption = writer.write(scene, rng, language, unseen=unseen, say_all=True)
            if len(cached().encode(chat(caption)).ids) <= MAX_TOKENS:
                break
        prompt = {
            "caption": caption,
            "language": language,
            "unseen": unseen,
            "seed": 1000 + number,
            "scene": scene.as_names(),
        }
        lines.append(json.dumps(prompt, ensure_ascii=False))
    (arguments.out / "prompts.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    print(f"{len(lines)} prompts in {arguments.out}")


if __name__ == "__main__":
    main()
