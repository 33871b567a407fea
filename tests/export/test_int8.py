"""Bundles in int8: their numbers, their graphs, and their images against fp32."""

from __future__ import annotations

import dataclasses
import platform
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from shared import ROOT
from zimage_rt.export.bundle import export
from zimage_rt.export.graph.trace import trace
from zimage_rt.export.modeling.quantized import QuantizedLinear, quantized_columns, rotated, rotation_matrix
from zimage_rt.export.precision import FP8, INT8, INT8_CPU, Precision
from zimage_rt.export.recipe import CALIBRATION, read_recipe

import zimage_rt
from zimage_rt import _core
from zimage_rt.backends.merge import quantized_columns as quantized_by_numpy
from zimage_rt.backends.onnxruntime import exact_products
from zimage_rt.bundle.manifest import TensorSpec, read_manifest
from zimage_rt.bundle.quantized import dequantized
from zimage_rt.bundle.safetensors_file import TensorFile

PROMPTS = ("a red fox on a blue background", "一只熊猫，绿色背景")


@pytest.fixture(scope="module")
def int8_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = read_recipe(ROOT / "engines" / "nano.toml")
    out = tmp_path_factory.mktemp("int8") / "nano"
    changes = {"precision": "int8", "vae": ("tiny",), "calibration": CALIBRATION[:4]}
    export(dataclasses.replace(recipe, out=out, **changes))
    return out


def test_a_rotation_is_its_own_inverse() -> None:
    matrix = rotation_matrix(256)
    assert torch.equal(matrix, matrix.T) and torch.allclose(matrix @ matrix, torch.eye(256), atol=1e-6)
    assert torch.equal(matrix.abs(), torch.full((256, 256), 1 / 16))


@pytest.mark.parametrize("precision", [INT8, FP8, INT8_CPU], ids=["int8", "fp8", "int8 for the CPU"])
@pytest.mark.parametrize("outliers", [False, True])
def test_a_product_is_close(precision: Precision, outliers: bool) -> None:
    torch.manual_seed(3)
    layer = QuantizedLinear(512, 96, precision)
    matrix = torch.randn(96, 512)
    (weight, scale) = (layer.sources[name].assemble([matrix]) for name in ("weight", "weight_scale"))
    layer.load_state_dict({"weight": weight, "weight_scale": scale}, assign=True)
    x = torch.randn(33, 512)
    if outliers:
        x[:, 7] *= 300
    expected = x.double() @ matrix.double().T
    error = float((layer(x).double() - expected).norm() / expected.norm())
    # Rotated int8 bears a channel that is far larger than the others; a scale for the whole input does not.
    assert error < {"int8": 0.015, "fp8": 0.040}[precision.name] * (8 if outliers and precision is INT8_CPU else 1)


@pytest.mark.parametrize("precision", [INT8, INT8_CPU], ids=["int8", "int8 for the CPU"])
def test_the_graph_computes_what_the_layer_does(precision: Precision) -> None:
    torch.manual_seed(4)

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = QuantizedLinear(256, 64, precision)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

    with torch.device("meta"):
        traced = Module()
    spec = TensorSpec("image", "float32", ("batch", 5, 256))
    model = trace(traced, (spec,), (TensorSpec("out", "float32", ("batch", 5, 64)),), {})
    module = Module()
    sources = module.layer.sources
    matrix = torch.randn(64, 256)
    state = {f"layer.{name}": source.assemble([matrix]) for name, source in sources.items()}
    module.load_state_dict(state, assign=True)
    import onnx_ir

    for name, value in list(model.graph.initializers.items()):
        if name in state:
            value.const_value = onnx_ir.tensor(state[name].numpy(), name=name)
    session = onnxruntime.InferenceSession(onnx_ir.to_proto(model).SerializeToString())
    x = torch.randn(3, 5, 256)
    found = session.run(None, {"image": x.numpy()})[0]
    assert np.abs(found - module(x).numpy()).max() < 1e-3 * np.abs(found).max()
    # Whole numbers of unsigned activations and signed weights: the fast form of ONNX Runtime.
    assert any(node.op_type == "MatMulInteger" for node in model.graph)


def test_numbers_are_rounded_once() -> None:
    """A matrix that has 8 bits already, such as one of Comfy-Org's `int8_convrot` files, keeps its numbers."""
    torch.manual_seed(5)
    numbers = torch.randint(-127, 128, (40, 512), dtype=torch.int8)
    numbers[:, 0] = 127  # each row's largest, as such files have it
    scales = torch.rand(40) + 0.1
    stored = rotated(numbers.float() * scales[:, None], 256)  # as the reader gives it: rotated back
    layer = QuantizedLinear(512, 40, INT8)
    assert torch.equal(layer.sources["weight"].assemble([stored]).T, numbers)
    assert torch.allclose(layer.sources["weight_scale"].assemble([stored]), scales, rtol=1e-5)


def test_a_lora_is_rounded_as_the_export_rounds() -> None:
    matrix = torch.randn(64, 48)
    weight, scale = quantized_columns(matrix, INT8.quantization)  # type: ignore[arg-type]
    found, scales = quantized_by_numpy(matrix.numpy())
    assert np.array_equal(found, weight.numpy()) and np.allclose(scales, scale.numpy())


def test_stored_numbers_are_read_back(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    matrix = torch.randn(512, 40)  # [in, out]
    numbers, scale = quantized_columns(rotated(matrix.T, 256).T, INT8.quantization)  # type: ignore[arg-type]
    save_file({"w": numbers.contiguous(), "w_scale": scale}, tmp_path / "w.safetensors")
    found = dequantized(TensorFile(tmp_path / "w.safetensors"), "w", slice(3, 30), rotates=True)
    assert np.linalg.norm(found - matrix[:, 3:30].numpy()) < 0.015 * np.linalg.norm(matrix[:, 3:30])


@pytest.mark.parametrize("exact", [True, False])
def test_products_do_not_saturate_on_older_processors(
    monkeypatch: pytest.MonkeyPatch, int8_bundle: Path, exact: bool
) -> None:
    """Weights become unsigned only where that is needed: on a processor with VNNI it would halve the speed."""
    seen: list[bool] = []
    original = onnxruntime.InferenceSession

    def record(path: Any, options: onnxruntime.SessionOptions, *rest: Any, **more: Any) -> Any:
        try:
            seen.append(options.get_session_config_entry("session.x64quantprecision") == "1")
        except RuntimeError:  # not set
            seen.append(False)
        return original(path, options, *rest, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", record)
    monkeypatch.setattr(_core, "multiplies_bytes_exactly", lambda: exact)
    with zimage_rt.Engine.load(int8_bundle) as engine:
        engine.pipeline.load(["transformer"])
    assert set(seen) == {not exact}


def test_the_processor_is_known_as_linux_knows_it() -> None:
    flags = {
        flag
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("flags")
        for flag in line.partition(":")[2].split()
    }
    if platform.machine() != "x86_64" or not flags:
        pytest.skip("Linux on x86-64 lists the processor's instructions in /proc/cpuinfo")
    assert _core.multiplies_bytes_exactly() == bool(flags & {"avx512_vnni", "avx_vnni"})


def test_products_of_bytes_are_exact_on_this_processor() -> None:
    """The largest numbers, whose sum of two products does not fit into 16 bits."""
    numbers, weight = np.full((1, 64), 255, np.uint8), np.full((64, 8), 127, np.int8)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [1, 64])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [1, 8])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = onnxruntime.SessionOptions()
    for key, value in exact_products().items():
        options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert (session.run(None, {"x": numbers})[0] == 64 * 255 * 127).all()


def test_the_tiny_decoder_has_8_bits_but_for_its_result(int8_bundle: Path) -> None:
    decoder = TensorFile(int8_bundle / "tiny_vae_decoder.safetensors")
    kinds = {name: decoder.dtype(name) for name in decoder.tensors if len(decoder.tensors[name]["shape"]) == 4}
    assert len(kinds) == 35 and sorted(kinds.values()) == ["F32"] + 34 * ["I8"]
    graph = onnx.load(int8_bundle / "tiny_vae_decoder.onnx", load_external_data=False).graph
    last = [node for node in graph.node if node.op_type == "Conv"][-1]
    assert last.input[1] in kinds and kinds[last.input[1]] == "F32"
    spec = read_manifest(int8_bundle).module("tiny_vae_decoder")
    assert spec.precision == "int8"
    encoder = TensorFile(int8_bundle / "tiny_vae_encoder.safetensors")
    assert {encoder.dtype(name) for name in encoder.tensors} == {"F32"}


def test_its_parity_is_measured_in_8_bits(int8_bundle: Path) -> None:
    parity = read_manifest(int8_bundle).module("tiny_vae_decoder").parity
    assert parity is not None and parity.tolerance == 0.1
    assert 0.001 < max(case.relative_error for case in parity.cases) < parity.tolerance


def test_no_calibration_leaves_the_decoder_in_fp32(tmp_path: Path) -> None:
    recipe = read_recipe(ROOT / "engines" / "nano.toml")
    changes = {"precision": "int8", "vae": ("tiny",), "calibration": (), "parity": False}
    export(dataclasses.replace(recipe, out=tmp_path / "nano", **changes))
    decoder = TensorFile(tmp_path / "nano" / "tiny_vae_decoder.safetensors")
    assert {decoder.dtype(name) for name in decoder.tensors} == {"F32"}


def draw(engine: zimage_rt.Engine, prompt: str, seed: int) -> np.ndarray:
    return engine.generate(prompt, seed=seed, height=256, width=256, num_inference_steps=8, vae="tiny").images[0]


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / ((one.astype(float) - other.astype(float)) ** 2).mean()))


def test_images_are_those_of_fp32(int8_bundle: Path, engine: zimage_rt.Engine) -> None:
    file = TensorFile(int8_bundle / "transformer.safetensors")
    assert file.dtype("layers.0.feed_forward.w2.weight") == "I8" and file.dtype("all_x_embedder.2-1.weight") == "F32"
    lora = ROOT / "checkpoints" / "zimage-nano-cyanotype" / "cyanotype.safetensors"
    with zimage_rt.Engine.load(int8_bundle) as quantized:
        assert quantized.manifest.precision == "int8"
        for seed, prompt in enumerate(PROMPTS):
            assert psnr(draw(quantized, prompt, seed), draw(engine, prompt, seed)) > 38  # measured: 41.9 to 46
        plain = draw(quantized, PROMPTS[0], 0)
        name, other = quantized.load_lora(lora), engine.load_lora(lora)
        try:
            changed, wanted = draw(quantized, PROMPTS[0], 0), draw(engine, PROMPTS[0], 0)
        finally:
            engine.unload_lora(other)
        assert psnr(changed, wanted) > 34 and psnr(changed, plain) < 25
        quantized.unload_lora(name)
        assert np.array_equal(draw(quantized, PROMPTS[0], 0), plain)
