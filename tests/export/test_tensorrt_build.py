"""`zimage-export --backend tensorrt_rtx`: real builds for GPUs that are not here, and all a plan tells without one."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")
trt = pytest.importorskip(
    "tensorrt_rtx", reason="builds plans with TensorRT-RTX: pip install 'zimage-rt[tensorrt-rtx]'"
)

import onnx  # noqa: E402
import onnxruntime  # noqa: E402
from export_checkpoints import graphs_of, recipe  # noqa: E402
from shared import CHECKPOINT  # noqa: E402
from zimage_rt.export import weights  # noqa: E402
from zimage_rt.export.builders import tensorrt_rtx  # noqa: E402
from zimage_rt.export.bundle import export  # noqa: E402
from zimage_rt.export.checkpoint import open_checkpoint  # noqa: E402
from zimage_rt.export.graph import split as _split  # noqa: E402
from zimage_rt.export.parity.measure import TOLERANCES, sample, session  # noqa: E402
from zimage_rt.export.parity.reference import load_reference, reference_function  # noqa: E402
from zimage_rt.export.plan import plan_modules  # noqa: E402
from zimage_rt.export.precision import BF16, BF16_NATIVE, FP16_WIDE  # noqa: E402
from zimage_rt.export.tensorrt_options import TensorRTOptions  # noqa: E402

from zimage_rt.bundle.manifest import (  # noqa: E402
    EngineSpec,
    Manifest,
    ModuleSpec,
    ShapeRange,
    ShapeRanges,
    read_manifest,
)
from zimage_rt.bundle.verify import check_file  # noqa: E402

MODULES = {
    "text_encoder",
    "context_refiner",
    "transformer",
    "tiny_vae_decoder",
    "tiny_vae_encoder",
    "full_vae_decoder",
    "full_vae_encoder",
}
ENCODER, TRANSFORMER = (
    json.loads((CHECKPOINT / part / "config.json").read_text("utf-8")) for part in ("text_encoder", "transformer")
)
REFINERS, HEADS = TRANSFORMER["n_refiner_layers"], TRANSFORMER["n_heads"]
# Of the modules with multi-head attention: how many there are in zimage-nano, and of how many heads.
ATTENTIONS = {
    "text_encoder": (ENCODER["num_hidden_layers"] - 1, ENCODER["num_attention_heads"]),  # the last layer is dropped
    "context_refiner": (REFINERS, HEADS),
    "transformer": (TRANSFORMER["n_layers"] + REFINERS, HEADS),
}
SIDE = ShapeRange(64, 1024, 1024, 16)
SHAPES = ShapeRanges(ShapeRange(1, 1, 2), SIDE, SIDE, ShapeRange(1, 64, 512))
OPTIONS = TensorRTOptions(sm=(86, 89, 120), optimization_level=1)
# One request's shapes, for every module.
CONCRETE = {
    "input_ids": (2, 37),
    "prompt_embeds": (2, 37, 256),
    "latents": (1, 16, 24, 20),
    "timestep": (1,),
    "context": (1, 64, 384),
    "image": (1, 3, 192, 160),
}


@pytest.fixture(scope="module", params=["fp16", "bf16"])
def built(
    request: pytest.FixtureRequest, bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Manifest]:
    """Every module of zimage-nano for three targets in each plan, dynamic in every size."""
    out = tmp_path_factory.mktemp("plans") / request.param
    changes = {"precision": request.param, "backend": "tensorrt_rtx", "shapes": SHAPES, "parity": False}
    with graphs_of(bundle, CHECKPOINT):  # the full VAE stays fp32 beside fp16
        return out, export(recipe(CHECKPOINT, out, **changes, tensorrt=OPTIONS))


def plan_text(bundle: Path, engine: EngineSpec) -> str:
    """A plan holds its layers and its kernels' source as text."""
    return (bundle / engine.file).read_bytes().decode("latin1")


@contextlib.contextmanager
def network_of(graph: Path) -> Iterator[Any]:
    """What TensorRT's parser makes of a graph; the parser finds the weights by itself here."""
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, builder.logger)
    assert parser.parse_from_file(str(graph)), parser.get_error(0).desc()
    yield network  # it points into the parser, which lives until here
    del parser


def build_again(bundle: Path, name: str, folder: Path, options: TensorRTOptions, **changes: Any) -> tuple[Any, ...]:
    """Build one module of a bundle once more, from its own graph, with other options."""
    manifest = read_manifest(bundle)
    precision = {"fp16": FP16_WIDE, "bf16": BF16_NATIVE}[manifest.precision]
    plan = next(plan for plan in plan_modules(open_checkpoint(CHECKPOINT), precision, ()) if plan.name == name)
    given = recipe(CHECKPOINT, folder / "bundle", precision=manifest.precision, shapes=SHAPES, tensorrt=options)
    graph = bundle / changes.pop("graph", f"{name}.onnx")
    progress = changes.pop("progress", lambda *_: None)
    return tensorrt_rtx.build(plan, graph, folder, given, manifest.pipeline, progress)


# --- what is built ----------------------------------------------------------------------------------------------------


def test_every_module_has_a_plan_for_every_target(built: tuple[Path, Manifest]):
    bundle, manifest = built
    assert set(manifest.modules) == MODULES
    assert read_manifest(bundle).bundle_id == manifest.bundle_id
    for name, module in manifest.modules.items():
        (engine,) = module.engines
        assert (engine.file, engine.backend, engine.part) == (f"{name}.engine", "tensorrt_rtx", 0)
        assert engine.version == trt.__version__
        assert engine.compute_capabilities == ("8.6", "8.9", "12.0")
        assert (engine.inputs, engine.outputs, engine.stripped) == (module.inputs, module.outputs, False)
        check_file(bundle, engine.file, manifest.files[engine.file])
        targets = set(re.findall(r"accelerators=\{([^}*]+)\}", plan_text(bundle, engine)))
        assert {tuple(found.split()) for found in targets} == {("sm86", "sm89", "sm120")}


def test_borders_and_profiles(built: tuple[Path, Manifest]):
    bundle, manifest = built
    for name, module in manifest.modules.items():
        with network_of(bundle / module.graph) as network:
            tensors = [network.get_input(i) for i in range(network.num_inputs)]
            tensors += [network.get_output(i) for i in range(network.num_outputs)]
            found = [(tensor.name, tensor.dtype, tuple(tensor.shape)) for tensor in tensors]
        specs = [*module.inputs, *module.outputs]
        kinds = {"float32": trt.float32, "int64": trt.int64}
        assert [(name, kind) for name, kind, _ in found] == [(spec.name, kinds[spec.dtype]) for spec in specs]
        for (_, _, shape), spec in zip(found, specs, strict=True):
            assert len(shape) == len(spec.dims)
            for size, dim in zip(shape, spec.dims, strict=True):
                assert size == dim if isinstance(dim, int) else size == -1
        (profile,) = module.engines[0].profiles
        assert set(profile) == {spec.name for spec in module.inputs}
        for spec in module.inputs:
            for limit in ("min", "opt", "max"):
                wanted = tuple(
                    getattr(SHAPES.of(dim, manifest.pipeline), limit) if isinstance(dim, str) else dim
                    for dim in spec.dims
                )
                assert getattr(profile[spec.name], limit) == wanted


def test_every_attention_is_one_kernel_that_accumulates_in_fp32(built: tuple[Path, Manifest]):
    """From the plan: as many fused kernels as attentions, no softmax outside of them, and their accumulators."""
    bundle, manifest = built
    for name, (count, _) in ATTENTIONS.items():
        text = plan_text(bundle, manifest.modules[name].engines[0])
        calls = re.findall(r"function=\{ name=(\w+) [^\n]*?layers=\"([^\"]*)\"", text, re.DOTALL)
        fused = [layers for kernel, layers in calls if kernel == "_gemm_mha_v2"]
        assert len(fused) == count, name
        for layers in fused:
            assert len(re.findall(r"node_matmul", layers)) == 2, name
            assert len(re.findall(r"node_softmax", layers)) == 1, name
        assert not any("softmax" in layers for kernel, layers in calls if kernel != "_gemm_mha_v2"), name
        # (scores, probabilities times values): `fp32_traits` are fp16 products with fp32 sums, bf16 has no others.
        wanted = {"fp16": "Ampere_hmma_fp32_traits", "bf16": "Ampere_hmma_bf16_traits"}[manifest.precision]
        traits = re.findall(r"Kernel_traits_v2_flash_attention<\s*fmha::(\w+),\s*fmha::(\w+),", text)
        assert traits
        assert set(traits) == {(wanted, wanted)}, name
        kinds = set(re.findall(r"initialize\(DATA_TYPE_(\w+), DATA_TYPE_\w+, DATA_TYPE_(\w+),", text))
        assert kinds == {(manifest.precision.upper(), "FP32")}, name


def test_no_buffer_is_as_large_as_the_scores(built: tuple[Path, Manifest], tmp_path: Path):
    bundle, manifest = built
    heads = ATTENTIONS["transformer"][1]
    options = TensorRTOptions(
        sm=(89,), profiles=(dataclasses.replace(SHAPES, batch=ShapeRange(1, 1, 1)),), optimization_level=1
    )
    (engine,) = build_again(bundle, "transformer", tmp_path, options)
    tokens = 64 * 64 + 512
    assert 0 < engine.activation_bytes < 0.6 * heads * tokens**2 * 2
    assert 0 < manifest.modules["transformer"].engines[0].activation_bytes < 0.6 * 2 * heads * tokens**2 * 2


def test_norms_softmax_rotation_and_modulation_stay_fp32(built: tuple[Path, Manifest]):
    """Types are the graph's, and TensorRT keeps them: the network is strongly typed."""
    bundle, manifest = built
    low = {"fp16": trt.float16, "bf16": trt.bfloat16}[manifest.precision]
    matmuls = {}
    for name in ATTENTIONS:
        with network_of(bundle / manifest.modules[name].graph) as network:
            assert network.get_flag(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
            layers = [network.get_layer(i) for i in range(network.num_layers)]
            for layer in layers:
                if layer.type in (trt.LayerType.REDUCE, trt.LayerType.SOFTMAX, trt.LayerType.UNARY):
                    assert layer.get_output(0).dtype not in (trt.float16, trt.bfloat16), f"{name}: {layer.name}"
            products = [layer for layer in layers if layer.type == trt.LayerType.MATRIX_MULTIPLY]
            matmuls[name] = [product.get_input(0).dtype for product in products]
    # qkv, scores, values, to_out, w13, w2; the encoder's and the refiner's embedding.
    wide = manifest.precision == "fp16"  # probabilities times values: told to be fp32, and fused as fp16
    for name, (count, _) in ATTENTIONS.items():
        extra = {"context_refiner": 1, "transformer": 2}.get(name, 0)
        assert matmuls[name].count(low) == (5 if wide else 6) * count + extra, name
        # The timestep's two layers, and one modulation for each block and the final layer.
        modulation = 2 + count + 1 if name == "transformer" else 0
        assert matmuls[name].count(trt.float32) == (count if wide else 0) + modulation, name


def test_tensorrt_infers_the_shapes_that_onnx_runtime_computes(built: tuple[Path, Manifest]):
    """Layer by layer, from one and the same file: the graph whose numbers parity has measured."""
    bundle, manifest = built
    if manifest.precision == "bf16":
        pytest.skip("ONNX Runtime has no bf16 kernels on the CPU; the graph differs from fp16's in types alone")
    for name, module in manifest.modules.items():
        graph = bundle / module.graph
        check_file(bundle, graph.name, manifest.files[graph.name])
        with network_of(graph) as network:
            for i in range(network.num_inputs):
                network.get_input(i).shape = CONCRETE[network.get_input(i).name]
            layers = [network.get_layer(i) for i in range(network.num_layers)]
            tensors = [layer.get_output(j) for layer in layers for j in range(layer.num_outputs)]
            inferred = {tensor.name: (tuple(tensor.shape), tensor.dtype) for tensor in tensors}
        model = onnx.load(graph, load_external_data=False)
        values = [output for node in model.graph.node for output in node.output]
        model.graph.output.extend(
            onnx.ValueInfoProto(name=value)
            for value in values
            if value not in {output.name for output in model.graph.output}
        )
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        path = bundle / "all.onnx"  # external data must lie beside it
        onnx.save(model, path)
        runtime = onnxruntime.InferenceSession(path, options)
        path.unlink()
        rng = np.random.default_rng(0)
        feeds = {
            spec.name: rng.integers(0, 4096, CONCRETE[spec.name])
            if spec.dtype == "int64"
            else rng.standard_normal(CONCRETE[spec.name], dtype=np.float32)
            for spec in module.inputs
        }
        names = [output.name for output in runtime.get_outputs()]
        kinds = {"float16": trt.float16, "float32": trt.float32, "int64": trt.int64, "bool": trt.bool}
        compared = 0
        for value, array in zip(names, runtime.run(names, feeds), strict=True):
            if value in inferred:
                assert inferred[value] == (array.shape, kinds[str(array.dtype)]), f"{name}: {value}"
                compared += 1
        assert compared > 0.6 * len(names), f"{name}: {compared} of {len(names)}"


# --- bf16 -------------------------------------------------------------------------------------------------------------


def test_bf16_arithmetic_is_close_and_parity_is_the_twins(small_checkpoint: Path, tmp_path: Path):
    """Torch computes in bf16 what the plan computes; ONNX Runtime measures the same weights in the fp32 twin."""
    options = TensorRTOptions(sm=(89,), optimization_level=0)
    changes = {"precision": "bf16", "backend": "tensorrt_rtx", "shapes": SHAPES, "vae": (), "tensorrt": options}
    manifest = export(recipe(small_checkpoint, tmp_path / "bf16", **changes))
    assert {path.name for path in (tmp_path / "bf16").iterdir()} == {*manifest.files, "manifest.json"}
    for module in manifest.modules.values():
        assert module.config["compute"] == "bfloat16"
        assert module.parity is not None
        assert module.parity.runtime.endswith("computed in float32")
    checkpoint = open_checkpoint(small_checkpoint)
    sizes = {"batch": 2, "prompt_tokens": 31, "latent_height": 12, "latent_width": 20, "context_tokens": 64}
    for plan in plan_modules(checkpoint, BF16_NATIVE, ()):
        reference = reference_function(plan.name, load_reference(plan.component))
        arrays = [torch.from_numpy(sample(spec, sizes, 100, 0)) for spec in plan.inputs]
        with torch.no_grad():
            wanted = reference(*arrays)
            got = weights.load(plan.build(), plan.component)(*arrays)
        error = float((got - wanted).norm() / wanted.norm())
        assert 1e-4 < error < TOLERANCES["bf16"], plan.name


def test_twins_share_weight_files(small_checkpoint: Path):
    plans = [plan_modules(open_checkpoint(small_checkpoint), precision, ()) for precision in (BF16, BF16_NATIVE)]
    for one, other in zip(*plans, strict=True):
        assert weights.layout(one.meta_module()) == weights.layout(other.meta_module())


# --- options ----------------------------------------------------------------------------------------------------------


def test_several_profiles(built: tuple[Path, Manifest], tmp_path: Path):
    bundle, _ = built
    half, whole = ShapeRange(64, 512, 512, 16), ShapeRange(512, 1024, 1024, 16)
    profiles = tuple(dataclasses.replace(SHAPES, height=side, width=side) for side in (half, whole))
    options = TensorRTOptions(sm=(120,), profiles=profiles, workspace_gb=1, optimization_level=0)
    (engine,) = build_again(bundle, "transformer", tmp_path, options)
    assert [profile["latents"].opt[2:] for profile in engine.profiles] == [(64, 64), (128, 128)]
    assert [profile["latents"].max for profile in engine.profiles] == [(2, 16, 64, 64), (2, 16, 128, 128)]
    assert plan_text(tmp_path, engine).count("function={ name=_gemm_mha_v2 ") == 2 * ATTENTIONS["transformer"][0]


@pytest.mark.parametrize(("name", "count"), [("transformer", 3), ("transformer", 2), ("text_encoder", 4)])
def test_split_modules_chain_and_share_nothing(built: tuple[Path, Manifest], tmp_path: Path, name: str, count: int):
    bundle, manifest = built
    module = manifest.modules[name]
    steps: list[str] = []
    engines = build_again(
        bundle,
        name,
        tmp_path,
        TensorRTOptions(sm=(86,), split={name: count}, optimization_level=0),
        progress=lambda step, *_: steps.append(step),
    )
    assert [engine.file for engine in engines] == [f"{name}.{i}.engine" for i in range(count)]
    assert [engine.part for engine in engines] == list(range(count))
    assert {f"build {i + 1}/{count}" for i in range(count)} <= set(steps)
    for before, after in pairwise(engines):
        (border,) = before.outputs
        assert after.inputs[0] == border
        assert border.dtype == "float32"
        assert border.dims == ("batch", f"{name}_tokens", after.inputs[0].dims[-1])
        assert set(after.inputs[1:]) <= set(module.inputs)
    assert engines[-1].outputs == module.outputs
    fused = [plan_text(tmp_path, engine).count("function={ name=_gemm_mha_v2 ") for engine in engines]
    assert sum(fused) == ATTENTIONS[name][0]
    if name == "transformer":
        limits = engines[1].profiles[0][engines[1].inputs[0].name]
        tokens = (math.ceil(4 * 4 / 32) * 32 + 32, 64 * 64 + 64, 64 * 64 + 512)
        assert (limits.min, limits.opt, limits.max) == ((1, tokens[0], 384), (1, tokens[1], 384), (2, tokens[2], 384))


@pytest.mark.parametrize(("name", "firsts"), [("transformer", (1, 2)), ("text_encoder", (1, 2, 3))])
def test_split_graphs_compute_what_the_whole_computes(built: tuple[Path, Manifest], name: str, firsts: tuple[int, ...]):
    bundle, manifest = built
    if manifest.precision == "bf16":
        pytest.skip("ONNX Runtime has no bf16 kernels on the CPU")
    module: ModuleSpec = manifest.modules[name]
    rng = np.random.default_rng(1)
    known: dict[str, np.ndarray] = {
        spec.name: rng.integers(0, 4096, CONCRETE[spec.name])
        if spec.dtype == "int64"
        else rng.standard_normal(CONCRETE[spec.name], dtype=np.float32)
        for spec in module.inputs
    }
    (wanted,) = session(bundle / module.graph).run(None, known)
    model = onnx.load(bundle / module.graph, load_external_data=False)
    blocks = []
    for i, part in enumerate(_split.split(model, firsts, "tokens", 384 if name == "transformer" else 256)):
        path = bundle / f"{name}.part{i}.onnx"
        onnx.save(part, path)
        run = session(path)
        path.unlink()
        (output,) = run.get_outputs()
        feeds = {value.name: known[value.name] for value in run.get_inputs()}
        known[output.name] = run.run(None, feeds)[0]
        blocks.append(
            {found[1] for tensor in part.graph.initializer if (found := re.match(r"layers\.(\d+)", tensor.name))}
        )
    difference = known[module.outputs[0].name] - wanted
    # Not zero: ONNX Runtime fuses other nodes of a part than of the whole, and rounds elsewhere.
    assert np.linalg.norm(difference) < 1e-3 * np.linalg.norm(wanted)
    assert sum(map(len, blocks)) == len(set().union(*blocks))
