"""Kinds of damaged input to `zimage-export`: settings and weights of checkpoints, and recipes."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

from fuzzing import STRANGE, Kind, check, kind, mutate_bytes, mutate_json, to_text
from zimage_rt.export.checkpoint import open_checkpoint
from zimage_rt.export.plan import plan_modules
from zimage_rt.export.precision import FP32
from zimage_rt.export.recipe import read_recipe
from zimage_rt.export.tokenizer import chat_template, tokenizer_file


@kind("checkpoint settings")
class CheckpointSettings(Kind):
    """A diffusers folder with one of its JSON files changed: refused, or every tensor has the place that it says."""

    def __init__(self, folder: Path, bundle: Path) -> None:
        super().__init__(folder, bundle)
        from export_checkpoints import make_checkpoint

        self.checkpoint = make_checkpoint(folder / "checkpoint")
        self.files = sorted(path for path in self.checkpoint.rglob("*.json") if path.name != "tokenizer.json")

    def run(self, rng: random.Random) -> None:
        path = rng.choice(self.files)
        before = path.read_bytes()
        try:
            if rng.random() < 0.8:
                path.write_text(
                    to_text(rng, mutate_json(rng, json.loads(before))), encoding="utf-8", errors="surrogatepass"
                )
            else:
                path.write_bytes(mutate_bytes(rng, before))
            checkpoint = open_checkpoint(self.checkpoint)
            plans = plan_modules(checkpoint, FP32, ("tiny", "full"))
            check(len(plans) == 7, "other modules")
            chat_template(checkpoint.tokenizer)
            tokenizer_file(checkpoint.tokenizer)
        finally:
            path.write_bytes(before)


@kind("checkpoint weights")
class CheckpointWeights(Kind):
    """A component's safetensors file with its header or length changed."""

    def __init__(self, folder: Path, bundle: Path) -> None:
        super().__init__(folder, bundle)
        from export_checkpoints import make_checkpoint

        self.checkpoint = make_checkpoint(folder / "checkpoint")

    def run(self, rng: random.Random) -> None:
        component = rng.choice(("transformer", "text_encoder", "tiny_vae"))
        path = next((self.checkpoint / component).glob("*.safetensors"))
        kept = self.folder / "kept"
        shutil.copy(path, kept)
        try:
            content = path.read_bytes()
            length = int.from_bytes(content[:8], "little")
            header: Any = json.loads(content[8 : 8 + length])
            if rng.random() < 0.7:
                text = to_text(rng, mutate_json(rng, header)).encode("utf-8", "surrogatepass")
                path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
            else:
                path.write_bytes(mutate_bytes(rng, content[: 8 + length]) + content[8 + length :])
            for plan in plan_modules(open_checkpoint(self.checkpoint), FP32, ("tiny",)):
                for name in list(plan.component.tensors)[:50]:
                    check(len(plan.component.tensors[name].shape) < 9, "a tensor of many axes")
        finally:
            shutil.copy(kept, path)


@kind("recipe")
class RecipeFile(Kind):
    """A recipe with changed lines; what is taken says what the file says."""

    TEXT = """name = "x"
checkpoint = "ck"
out = "o"
precision = "bf16"
backend = "onnxruntime"
vae = ["tiny"]
num_inference_steps = 8
guidance_scale = 0.5
[parts]
tiny_vae = "t"
[config.scheduler]
shift = 3.0
[shapes]
batch = { min = 1, opt = 1, max = 8 }
height = { min = 64, opt = 1024, max = 2048, multiple = 16 }
[tensorrt]
sm = [89]
split = { transformer = 2 }
"""

    def run(self, rng: random.Random) -> None:
        path = self.folder / "r.toml"
        lines = self.TEXT.splitlines()
        at = rng.randrange(len(lines))
        key, _, value = lines[at].partition(" = ")
        numbers = ("1", "-1", "0", "nan", "inf", "1e400", "99999999999999999999", "2020-01-01")
        others = ('""', '"x"', "true", "[]", "[1]", "{}", "{ min = 0 }", '"\\u0000"', '["tiny", "tiny", 3]', "[[]]")
        other = rng.choice((*numbers, *others, str(rng.choice(STRANGE))[:50]))
        lines[at] = rng.choice((f"{key} = {other}", f"{key}2 = {value}", "", f"{lines[at]}\n{lines[at]}", other))
        content = "\n".join(lines).encode("utf-8", "surrogatepass")
        path.write_bytes(mutate_bytes(rng, content) if rng.random() < 0.2 else content)
        recipe = read_recipe(path)
        check(recipe.num_inference_steps >= 1 and 0 <= recipe.guidance_scale < float("inf"), "impossible numbers")
