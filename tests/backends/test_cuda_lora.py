"""LoRAs that are no product of thin matrices on the `cuda` backend, beside ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from cuda_reference import relative_error, require_gpu
from lora_files import random_lora_of, write

import zimage_rt
from zimage_rt.bundle.manifest import Manifest
from zimage_rt.bundle.modules import LORA_MODULES

pytestmark = pytest.mark.gpu
require_gpu()

PROMPT = "a panda"
TOLERANCE = {"bf16": 2e-2, "fp16": 4e-3}  # of a whole module against fp32, as in test_cuda_engine.py


def whole_lora_of(manifest: Manifest, path: Path, modules: tuple[str, ...] = LORA_MODULES) -> Path:
    """A LoKr of full rank of every linear layer, DoRA for some of them, and differences of biases and norms."""
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for module in modules:
        prefix = "text_encoder" if module == "text_encoder" else "transformer"
        for number, (name, place) in enumerate(manifest.module(module).linears.items()):
            key = f"{prefix}.{name}"
            w1 = torch.randn(place.columns // 16, place.in_features // 16, generator=generator)
            tensors[f"{key}.lokr_w1"] = w1 * (0.1 / place.in_features**0.5)
            tensors[f"{key}.lokr_w2"] = torch.randn(16, 16, generator=generator)
            if number % 3 == 0:
                tensors[f"{key}.dora_scale"] = 1 + torch.rand(place.columns, 1, generator=generator)
    if "transformer" in modules:
        for layer, size in (("layers.1.adaLN_modulation.0", 1536), ("t_embedder.mlp.2", 256), ("x_embedder", 384)):
            tensors[f"diffusion_model.{layer}.diff_b"] = 0.1 * torch.randn(size, generator=generator)
        for layer, size in (("layers.2.attention_norm1", 384), ("layers.2.attention.k_norm", 128)):
            tensors[f"diffusion_model.{layer}.diff"] = 0.1 * torch.randn(size, generator=generator)
    if "text_encoder" in modules:
        tensors["lora_te_layers_1_input_layernorm.w_norm"] = 0.1 * torch.randn(256, generator=generator)
    return write(path, tensors)


def module_outputs(engine: zimage_rt.Engine) -> Iterator[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(3)
    latents, context = rng.standard_normal((1, 16, 32, 32)), rng.standard_normal((1, 64, 384))
    inputs = {"latents": latents, "timestep": np.full(1, 0.4), "context": context}
    inputs = {name: value.astype(np.float32) for name, value in inputs.items()}
    yield "context", engine.encode_prompt(PROMPT)
    yield "transformer", engine.pipeline.module("transformer")(inputs)["noise_pred"]


@pytest.fixture
def unload() -> Iterator[list[zimage_rt.Engine]]:
    engines: list[zimage_rt.Engine] = []
    yield engines
    for engine in engines:
        for name in engine.loras:
            engine.unload_lora(name)


def test_whole_changes_are_those_of_onnxruntime_and_leave_the_same_bytes(cuda, reference, unload, tmp_path):
    unload += [cuda, reference]
    whole = whole_lora_of(cuda.manifest, tmp_path / "whole.safetensors")
    thin = random_lora_of(cuda.manifest, tmp_path / "thin.safetensors", seed=2, modules=("transformer",))
    before = dict(module_outputs(cuda))
    for engine in (cuda, reference):
        engine.load_lora(whole, weight=0.6)
        engine.load_lora(thin, weight=-1.0)
    expected, ours = dict(module_outputs(reference)), dict(module_outputs(cuda))
    for name, value in ours.items():
        assert relative_error(value, before[name]) > 0.05, name
        assert relative_error(value, expected[name]) < 2 * TOLERANCE[cuda.manifest.precision], name
    cuda.set_loras({"thin": -1.0})
    reference.set_loras({"thin": -1.0})
    for (name, value), (_, want) in zip(module_outputs(cuda), module_outputs(reference), strict=True):
        assert relative_error(value, want) < 2 * TOLERANCE[cuda.manifest.precision], name
    cuda.set_loras({})
    for name, value in module_outputs(cuda):
        assert value.tobytes() == before[name].tobytes(), name


def test_a_swap_leaves_captured_graphs_as_they_are(bf16, unload, tmp_path):
    unload.append(bf16)
    options = {"seed": 5, "num_inference_steps": 3}
    plain = [bf16.generate(PROMPT, **options).images.tobytes() for _ in range(3)]
    graphs = bf16.pipeline.native.graph_count
    bf16.load_lora(whole_lora_of(bf16.manifest, tmp_path / "whole.safetensors"), weight=0.5)
    assert bf16.generate(PROMPT, **options).images.tobytes() not in plain
    assert bf16.pipeline.native.graph_count == graphs
    bf16.unload_lora("whole")
    assert bf16.generate(PROMPT, **options).images.tobytes() == plain[0]


def test_a_text_encoder_on_the_host_takes_one(cuda_bundles, bf16, unload, tmp_path):
    moving = zimage_rt.Engine.load(cuda_bundles["bf16"], backend="cuda", backend_options={"text_encoder": "host"})
    unload += [bf16, moving]
    plain = moving.encode_prompt(PROMPT)
    path = whole_lora_of(bf16.manifest, tmp_path / "text.safetensors", ("text_encoder",))
    for engine in (bf16, moving):
        engine.load_lora(path)
    assert moving.encode_prompt(PROMPT).tobytes() == bf16.encode_prompt(PROMPT).tobytes()
    assert moving.encode_prompt(PROMPT).tobytes() != plain.tobytes()
    moving.unload_lora("text")
    assert moving.encode_prompt(PROMPT).tobytes() == plain.tobytes()
