"""Images of zimage-nano from quantised files of its weights, against those of the bf16 weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers import ZImageTransformer2DModel  # noqa: E402
from export_checkpoints import recipe  # noqa: E402
from lora_files import peft, random_lora, write  # noqa: E402
from quantized_files import quantize  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from shared import CHECKPOINT  # noqa: E402
from single_files import comfyui_names  # noqa: E402
from zimage_rt.benchmarks.fidelity import psnr  # noqa: E402
from zimage_rt.export.bundle import export  # noqa: E402

import zimage_rt  # noqa: E402

PROMPT, SEED = "a panda on a blue background", 3
BLOCKS = ("qkv.weight", "out.weight", "w1.weight", "w2.weight", "w3.weight", "adaLN_modulation.0.weight")


def draw(engine: zimage_rt.Engine) -> np.ndarray:
    return engine.generate(PROMPT, seed=SEED, height=256, width=256, vae="tiny").images[0].astype(np.float64)


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory):
    """Engines by layout; the quantised layers are Comfy-Org's choice, for nvfp4 only the main blocks."""
    source = load_file(CHECKPOINT / "transformer" / "diffusion_pytorch_model.safetensors")
    tensors = comfyui_names(source)
    parts = {name: CHECKPOINT / name for name in ("text_encoder", "tokenizer", "tiny_vae", "scheduler")}
    folder = tmp_path_factory.mktemp("quantised")
    engines: dict[str, zimage_rt.Engine] = {}

    def load(layout: str) -> zimage_rt.Engine:
        if layout not in engines:
            within = ".layers." if layout == "nvfp4" else "."
            file, _, _ = quantize(
                tensors, layout, lambda name: "final_layer" not in name and within in name and name.endswith(BLOCKS)
            )
            path = folder / f"{layout}.safetensors"
            save_file({name: tensor.contiguous() for name, tensor in file.items()}, path)
            export(recipe(path, folder / layout, parts=parts, vae=("tiny",), parity=False))
            engines[layout] = zimage_rt.Engine.load(folder / layout)
        return engines[layout]

    return load


@pytest.mark.parametrize("layout", ["int8_tensorwise-per-row", "int8_convrot", "float8_e4m3fn", "mxfp8", "nvfp4"])
def test_quantised_weights_draw_nearly_the_same_image(layout: str, load, engine: zimage_rt.Engine):
    """At least 30 dB from the image of the bf16 weights; docs/formats.md has the measured values."""
    assert psnr(draw(load(layout)), draw(engine)) >= 30


def test_a_lora_changes_the_image_of_scaled_fp8_as_that_of_bf16(load, engine: zimage_rt.Engine, tmp_path: Path):
    """A LoRA is as large as the weights; without scales it would be negligible."""
    model = ZImageTransformer2DModel.from_pretrained(CHECKPOINT / "transformer")
    path = write(tmp_path / "lora.safetensors", peft(random_lora(model, seed=4)))
    plain, changed = [], []
    for one in (engine, load("float8_e4m3fn")):
        plain.append(draw(one))
        one.load_lora(path)
        changed.append(draw(one))
        one.unload_lora("lora")
    sizes = [float(np.abs(after - before).mean()) for before, after in zip(plain, changed, strict=True)]
    assert sizes[0] > 5
    assert sizes[1] == pytest.approx(sizes[0], rel=0.1)
