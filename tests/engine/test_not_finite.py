"""A module that returns NaN raises an error with its name and possible causes, instead of a black image."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shared import ROOT, copy_bundle

import zimage_rt
from zimage_rt.errors import NotFinite
from zimage_rt.not_finite import with_causes

SMALL: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 1, "seed": 3}
GREY = np.full((64, 64, 3), 128, np.uint8)


def damaged(bundle: Path, folder: Path, module: str) -> zimage_rt.Engine:
    """The bundle with a module of NaN weights."""
    path = copy_bundle(bundle, folder, module) / f"{module}.safetensors"
    data = bytearray(path.read_bytes())
    start = 8 + struct.unpack("<Q", data[:8])[0]
    data[start:] = np.full((len(data) - start) // 4, np.nan, np.float32).tobytes()
    path.write_bytes(data)
    return zimage_rt.Engine.load(folder, verify=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "bundle"


@pytest.mark.parametrize(
    ("module", "fields"),
    [
        ("text_encoder", {}),
        ("context_refiner", {}),
        ("transformer", {}),
        ("tiny_vae_decoder", {}),
        ("tiny_vae_decoder", {"vae_tile": 128}),
        ("full_vae_decoder", {"vae": "full"}),
        ("tiny_vae_encoder", {"image": GREY, "strength": 1.0}),
    ],
)
def test_every_module_is_checked(bundle: Path, folder: Path, module: str, fields: dict[str, Any]) -> None:
    engine = damaged(bundle, folder, module)
    with pytest.raises(NotFinite) as caught:
        engine.generate("a panda", **SMALL, **fields)
    assert caught.value.module == module
    assert str(caught.value) == (
        f"{module}: gave numbers that are not finite: it runs in fp32; no LoRA is on and there is no guidance; "
        "the checkpoint's weights are damaged: compare its files with their source, and export it again"
    )


def test_a_lora_and_guidance_are_named(engine: zimage_rt.Engine) -> None:
    name = engine.load_lora(ROOT / "checkpoints" / "zimage-nano-cyanotype" / "cyanotype.safetensors", 1e30)
    try:
        with pytest.raises(NotFinite) as caught:
            engine.generate("a panda", guidance_scale=2.5, **SMALL)
    finally:
        engine.unload_lora(name)
    assert caught.value.module == "transformer"
    assert str(caught.value).endswith(
        "it runs in fp32; LoRAs are on: 'cyanotype' at 1e+30; guidance_scale is 2.5; take the LoRAs off or give them "
        "smaller weights, or ask for a smaller guidance_scale"
    )
    assert engine.generate("a panda", **SMALL).images.std() > 0  # the engine keeps working


@pytest.mark.parametrize(("precision", "advised"), [("fp16", True), ("bf16", False), ("fp32", False)])
def test_another_precision_is_advised_for_fp16_alone(precision: str, advised: bool) -> None:
    for loras, scale in (({}, 0.0), ({"style": 1.0}, 4.0)):
        text = str(with_causes(NotFinite("transformer"), precision, loras, scale))
        assert ("export the bundle in bf16 or fp32" in text) == advised
        assert f"it runs in {precision}" in text
    explained = with_causes(NotFinite("transformer"), "fp16", {}, 0.0)
    assert with_causes(explained, "fp32", {}, 2.0) is explained
