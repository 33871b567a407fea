"""Write the judge's data: the atlas, the scenes' geometry, and the held-out prompts.

python heldout.py --atlas atlas.npz --out ../../benchmarks/quality/data
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np
from captions import CaptionWriter
from phrases import COLOURS, SIZE_NAMES, STYLE_NAMES
from PIL import Image
from scenes import CENTRES, PAIR_SIZE, SINGLE_SIZES, WORD_SUBJECT_SIZE, held_out_scene, subjects

SIDE = 64
# One round of prompts; the file repeats it, so that any beginning of the file is a fair sample.
ROUND = [
    ("single", "zh", False), ("left_right", "en", False), ("top_bottom", "zh", False),
    ("single", "en", False), ("left_right", "zh", False), ("top_bottom", "en", False),
    ("single", "zh", False), ("single", "mixed", False), ("left_right", "mixed", False),
    ("top_bottom", "mixed", False), ("word", "zh", False), ("single", "en", False),
    ("single", "en", True), ("left_right", "zh", True), ("single", "zh", True),
    ("top_bottom", "en", True), ("left_right", "en", True), ("top_bottom", "zh", True),
    ("word", "en", False), ("single", "zh", False),
]  # fmt: skip
ROUNDS = 30


def shrink(sprite: np.ndarray) -> np.ndarray:
    """Reduce one drawing, premultiplied on the way so that edges keep their colour."""
    image = Image.fromarray(sprite).convert("RGBa").resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(image.convert("RGBA"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--atlas", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    sprites = np.load(arguments.atlas)["sprites"]
    small = np.stack([np.stack([shrink(s) for s in style]) for style in sprites])
    np.savez_compressed(arguments.out / "atlas.npz", sprites=small)
    pair = dict.fromkeys(SIZE_NAMES, PAIR_SIZE)
    meta = {
        "hexcodes": [s.hexcode for s in subjects()],
        "names": [s.english[0] for s in subjects()],
        "styles": STYLE_NAMES,
        "colours": {name: rgb for name, (rgb, _, _) in COLOURS.items()},
        "centres": CENTRES,
        "sizes": {
            "single": SINGLE_SIZES,
            "left_right": pair,
            "top_bottom": pair,
            "word": dict.fromkeys(SIZE_NAMES, WORD_SUBJECT_SIZE),
        },
    }
    text = json.dumps(meta, ensure_ascii=False, indent=1)
    (arguments.out / "scenes.json").write_text(text + "\n", "utf-8")
    rng, writer, lines = random.Random("held-out"), CaptionWriter(), []
    for number in range(ROUNDS * len(ROUND)):
        layout, language, unseen = ROUND[number % len(ROUND)]
        scene = held_out_scene(rng, layout)
        caption = writer.write(scene, rng, language, unseen=unseen, say_all=True)
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
