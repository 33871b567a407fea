"""The recipes of the original model export what a download has: a diffusers folder, or ComfyUI's `models` folder."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402
from shared import ROOT  # noqa: E402
from zimage_rt.export.bundle import export  # noqa: E402
from zimage_rt.export.errors import RecipeError  # noqa: E402
from zimage_rt.export.recipe import read_recipe  # noqa: E402

from zimage_rt.bundle.manifest import Manifest  # noqa: E402

MODULES = ["context_refiner", "text_encoder", "tiny_vae_decoder", "tiny_vae_encoder", "transformer"]
# The small checkpoint's, which no tensor's shape shows; the original's is what a single file is taken to have.
ROPE = {"text_encoder": {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}}


def export_by(name: str, root: Path) -> tuple[Manifest, Path]:
    """Export by a committed recipe that was copied to `root/engines`, beside `root/checkpoints`."""
    (root / "engines").mkdir()
    shutil.copy(ROOT / "engines" / name, root / "engines" / name)
    recipe = read_recipe(root / "engines" / name)
    if recipe.checkpoint.suffix == ".safetensors":
        recipe = dataclasses.replace(recipe, config=ROPE)
    return export(recipe), recipe.out


def test_calibration_takes_prompts(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text('checkpoint = "c"\nprecision = "int8"\ncalibration = []\n', encoding="utf-8")
    assert read_recipe(path).calibration == ()
    for value, message in (("[1]", "expected prompts, got 1"), ('"a cat"', "expected list, got 'a cat'")):
        path.write_text(f'checkpoint = "c"\ncalibration = {value}\n', encoding="utf-8")
        with pytest.raises(RecipeError, match=f"calibration: {message}"):
            read_recipe(path)


@pytest.fixture(scope="module")
def from_folder(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, Path]:
    root = tmp_path_factory.mktemp("folder")
    turbo = root / "checkpoints" / "Z-Image-Turbo"
    shutil.copytree(small_checkpoint, turbo)
    (turbo / "tiny_vae").rename(root / "checkpoints" / "taef1")  # the download has none
    return export_by("z-image-turbo.toml", root)


def test_a_diffusers_folder(from_folder: tuple[Manifest, Path]) -> None:
    manifest, _ = from_folder
    assert sorted(manifest.modules) == MODULES
    assert {module.precision for module in manifest.modules.values()} == {"bf16"}
    assert {module.graph for module in manifest.modules.values()} == {None}, "the cuda backend runs the weights"
    assert (manifest.shapes.height.opt, manifest.shapes.width.opt) == (1024, 1024)
    assert (manifest.pipeline.num_inference_steps, manifest.pipeline.guidance_scale) == (8, 0.0)


def test_comfyui_s_models_folder(
    single_file: Path,
    small_checkpoint: Path,
    from_folder: tuple[Manifest, Path],
    tmp_path: Path,
) -> None:
    checkpoints = tmp_path / "checkpoints"
    parts = {
        "model.diffusion_model.": "diffusion_models/z_image_turbo_bf16.safetensors",
        "text_encoders.qwen3_4b.transformer.": "text_encoders/qwen_3_4b.safetensors",
        "vae.": "vae/ae.safetensors",
    }
    tensors = load_file(single_file)
    for prefix, file in parts.items():
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        path = checkpoints / "comfyui" / file
        path.parent.mkdir(parents=True)
        save_file(own, path)
    shutil.copytree(small_checkpoint / "tokenizer", checkpoints / "tokenizer")
    shutil.copytree(small_checkpoint / "tiny_vae", checkpoints / "taef1")

    manifest, out = export_by("z-image-turbo-comfyui.toml", tmp_path)
    expected, expected_out = from_folder
    assert sorted(manifest.modules) == MODULES
    for name, module in manifest.modules.items():
        file = module.weights
        same = (out / file).read_bytes() == (expected_out / expected.modules[name].weights).read_bytes()
        assert same, f"{file}: the same weights from either layout"
    assert manifest.source["format"] == "single-file"
