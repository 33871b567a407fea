"""LoRA files of PEFT and diffusers, compared with the libraries themselves in fp32 on zimage-nano."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from lora_images import image_of, ours
from lora_layouts import changes_of
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from shared import CHECKPOINT
from zimage_rt.benchmarks.fidelity import psnr

import zimage_rt
from zimage_rt.bundle.manifest import read_manifest
from zimage_rt.lora.file import read_lora
from zimage_rt.lora.match import match_layers

NAMES = ["to_q", "to_v", "to_out.0", "w2", "layers.1.adaLN_modulation.0"]


@pytest.fixture(scope="module")
def reference() -> Any:
    pipeline = ZImagePipeline.from_pretrained(str(CHECKPOINT), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def loaded(bundle: Path) -> zimage_rt.Engine:
    return zimage_rt.Engine.load(bundle)


@pytest.fixture
def engine(loaded: zimage_rt.Engine) -> Iterator[zimage_rt.Engine]:
    yield loaded
    for name in loaded.loras:
        loaded.unload_lora(name)


def randomise(model: torch.nn.Module, size: float = 0.1) -> None:
    """Give an adapter numbers that change images: PEFT begins with none."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if ".lora_magnitude_vector" in name:
            parameter.data *= 1 + size * torch.randn(parameter.shape, generator=generator)
        elif any(part in name for part in (".lora_", ".lokr_", ".hada_")):
            parameter.data = size * torch.randn(parameter.shape, generator=generator)


KINDS = {
    "dora": LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=NAMES),
    "dora-rslora": LoraConfig(r=4, lora_alpha=3, use_dora=True, use_rslora=True, target_modules=NAMES),
    # Whole factors with PEFT's alpha / r, which its own files have beside them, not in them.
    "lokr": LoKrConfig(r=64, alpha=32, target_modules=NAMES),
    "lokr-thin": LoKrConfig(r=2, alpha=4, decompose_both=True, target_modules=NAMES),
    "loha": LoHaConfig(r=4, alpha=8, target_modules=NAMES),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_peft_changes_weights_as_peft_merges_them(bundle, tmp_path, kind):
    model = ZImageTransformer2DModel.from_pretrained(CHECKPOINT / "transformer")
    before = {name: value.double() for name, value in model.state_dict().items()}
    adapted = get_peft_model(model, KINDS[kind])
    randomise(adapted)
    adapted.save_pretrained(tmp_path)
    after = adapted.merge_and_unload().state_dict()
    expected = {name: after[name].double() - value for name, value in before.items()}
    expected = {name: delta.numpy() for name, delta in expected.items() if delta.abs().max() > 0}
    manifest = read_manifest(bundle)
    matrices, vectors = changes_of(match_layers(read_lora(tmp_path), manifest, bundle), manifest, bundle)
    assert not vectors
    assert {f"{name}.weight" for name in matrices} == set(expected)
    for name, delta in matrices.items():
        want = expected[f"{name}.weight"]
        # Both sums are rounded to fp32 weights, of which the changes are about a tenth.
        assert np.linalg.norm(delta - want) <= 1e-5 * np.linalg.norm(want), name


@pytest.mark.parametrize("written", ["dora", "mixed-ranks", "bias"])
def test_an_image_is_that_of_diffusers_with_what_it_wrote(engine, reference, tmp_path, written):
    settings: dict[str, Any] = {
        "dora": {"r": 3, "lora_alpha": 7, "use_dora": True, "target_modules": NAMES},
        "mixed-ranks": {
            "r": 3,
            "lora_alpha": 5,
            "target_modules": NAMES,
            # Full names, for which diffusers writes a ^ in front, and the end of one, as PEFT documents.
            "rank_pattern": {"^layers.0.attention.to_q": 6, "w2": 2},
            "alpha_pattern": {"^layers.0.attention.to_q": 12, "w2": 1, "^layers.1.attention.to_v": 9},
        },
        "bias": {
            "r": 3,
            "lora_alpha": 6,
            "lora_bias": True,
            "target_modules": ["layers.1.adaLN_modulation.0", "layers.3.adaLN_modulation.0"],
        },
    }[written]
    transformer = reference.transformer
    before = ours(engine)
    transformer.add_adapter(LoraConfig(**settings), "written")
    randomise(transformer, 0.15)
    state = get_peft_model_state_dict(transformer, adapter_name="written")
    metadata = transformer.peft_config["written"].to_dict()
    ZImagePipeline.save_lora_weights(tmp_path, state, transformer_lora_adapter_metadata=metadata)
    reference.delete_adapters("written")
    path = tmp_path / "pytorch_lora_weights.safetensors"
    assert load_file(path)
    reference.load_lora_weights(str(tmp_path), adapter_name="read")
    expected = image_of(reference)
    reference.unload_lora_weights()
    engine.load_lora(tmp_path, name="read")
    image = ours(engine)
    assert psnr(image, expected) >= 45
    assert psnr(image, before) < 40


def test_a_rank_pattern_that_diffusers_itself_writes_is_read(engine, reference, tmp_path):
    """diffusers finds mixed ranks in a file, and writes patterns of its own, with ^ in front, when it saves them."""
    transformer = reference.transformer
    generator = torch.Generator().manual_seed(5)
    state = {}
    for name, rank in (("layers.0.attention.to_k", 4), ("layers.0.attention.to_q", 2), ("layers.1.attention.to_k", 2)):
        out, width = transformer.get_submodule(name).weight.shape
        state[f"transformer.{name}.lora_A.weight"] = 0.15 * torch.randn(rank, width, generator=generator)
        state[f"transformer.{name}.lora_B.weight"] = 0.15 * torch.randn(out, rank, generator=generator)
    reference.load_lora_weights(dict(state), adapter_name="mixed")
    metadata = transformer.peft_config["mixed"].to_dict()
    assert metadata["alpha_pattern"] == {"^layers.0.attention.to_k": 4}
    saved = get_peft_model_state_dict(transformer, adapter_name="mixed")
    ZImagePipeline.save_lora_weights(tmp_path, saved, transformer_lora_adapter_metadata=metadata)
    expected = image_of(reference)
    reference.unload_lora_weights()
    engine.load_lora(tmp_path, name="mixed")
    assert psnr(ours(engine), expected) >= 45
