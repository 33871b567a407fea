"""`zimage-export` reads the single files that ComfyUI uses."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from export_checkpoints import recipe  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from zimage_rt.export.bundle import export  # noqa: E402
from zimage_rt.export.checkpoint import open_checkpoint  # noqa: E402
from zimage_rt.export.errors import CheckpointError  # noqa: E402

from zimage_rt.bundle.manifest import read_manifest  # noqa: E402


def test_single_file_gives_the_same_weights_as_the_folder(
    single_file: Path, small_checkpoint: Path, small_bundle: Path, tmp_path: Path
):
    manifest = export(
        recipe(
            single_file,
            tmp_path / "out",
            vae=("full",),
            parts={"tokenizer": small_checkpoint / "tokenizer"},
            config={
                "vae": {"norm_num_groups": 8},
                "text_encoder": {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
            },
        )
    )
    original = read_manifest(small_bundle)
    assert manifest.source["format"] == "single-file"
    for module in manifest.modules.values():
        assert manifest.files[module.weights] == original.files[module.weights]
        assert manifest.files[module.graph] == original.files[module.graph]


def test_split_files_are_parts_of_one_checkpoint(single_file: Path, small_checkpoint: Path, tmp_path: Path):
    """ComfyUI's other layout: transformer, text encoder and VAE in a file each, with no prefix over them all."""
    tensors = load_file(single_file)
    prefixes = {
        "transformer": "model.diffusion_model.",
        "text_encoder": "text_encoders.qwen3_4b.transformer.",  # what is left begins with `model.`, as in its own file
        "vae": "vae.",
    }
    files = {name: tmp_path / f"{name}.safetensors" for name in prefixes}
    for name, prefix in prefixes.items():
        save_file({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}, files[name])
    parts = {"text_encoder": files["text_encoder"], "vae": files["vae"], "tokenizer": small_checkpoint / "tokenizer"}
    parts["tiny_vae"] = small_checkpoint / "tiny_vae"
    split, folder = open_checkpoint(files["transformer"], parts), open_checkpoint(small_checkpoint)
    for name in (*prefixes, "tiny_vae"):
        found, wanted = getattr(split, name), getattr(folder, name)
        assert found.tensors.keys() == wanted.tensors.keys()
        for key, tensor in wanted.tensors.items():
            assert torch.equal(found.tensors[key].load(), tensor.load()), key


def test_single_file_without_tokenizer_says_what_to_add(single_file: Path):
    with pytest.raises(CheckpointError, match=r"has no tokenizer.*\[parts\]"):
        open_checkpoint(single_file)


def test_other_models_files_are_named(tmp_path: Path):
    path = tmp_path / "flux.safetensors"
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(CheckpointError, match="looks like a Flux transformer"):
        open_checkpoint(path)
