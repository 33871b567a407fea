"""Small real plans in a bundle: from TensorRT-RTX for GPUs that are not here, from TensorRT for this one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from zimage_rt.bundle.manifest import (
    EngineSpec,
    Manifest,
    ModuleSpec,
    PipelineSpec,
    ProfileRange,
    ShapeRange,
    ShapeRanges,
    TensorSpec,
    write_manifest,
)
from zimage_rt.bundle.verify import hash_file

WIDTH = 16
# Not a module of Z-Image's, whose tensors have other names.
MODULE = "chain"
X, H, Y = (TensorSpec(name, "float32", ("batch", WIDTH)) for name in ("x", "hidden", "y"))
# One tuned for little batches, one for large ones; they overlap from 4 to 8.
PROFILES = ((1, 2, 8), (4, 16, 32))


def weights(part: int) -> np.ndarray:
    return np.random.default_rng(part).standard_normal((WIDTH, WIDTH), dtype=np.float32)


def reference(x: np.ndarray) -> np.ndarray:
    """Output of the two parts together."""
    return (x @ weights(0)) @ weights(1) + x


def build(trt: Any, part: int, targets: tuple[str, ...]) -> bytes:
    """Part 0 makes `hidden` from `x`; part 1 makes `y` from `hidden` and, once more, `x`. `trt` is either package."""
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # 11 and RTX have no other networks
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    inputs = [X] if part == 0 else [H, X]
    tensors = [network.add_input(spec.name, trt.float32, (-1, WIDTH)) for spec in inputs]
    kernel = weights(part)
    constant = network.add_constant(kernel.shape, trt.Weights(kernel)).get_output(0)
    none = trt.MatrixOperation.NONE
    output = network.add_matrix_multiply(tensors[0], none, constant, none).get_output(0)
    if part == 1:
        output = network.add_elementwise(output, tensors[1], trt.ElementWiseOperation.SUM).get_output(0)
    output.name = (H, Y)[part].name
    network.mark_output(output)
    config = builder.create_builder_config()
    if hasattr(trt, "ComputeCapability"):
        config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, "SM" + target.replace(".", "")), index)
    for sizes in PROFILES:
        profile = builder.create_optimization_profile()
        for spec in inputs:
            profile.set_shape(spec.name, *((size, WIDTH) for size in sizes))
        config.add_optimization_profile(profile)
    return bytes(builder.build_serialized_network(network, config))


def write_bundle(trt: Any, folder: Path, targets: tuple[str, ...]) -> Manifest:
    """A bundle of one module, `MODULE`, split into two plans."""
    folder.mkdir(parents=True, exist_ok=True)
    engines = []
    for part in (0, 1):
        file = f"{MODULE}.part{part}.engine"
        (folder / file).write_bytes(build(trt, part, targets))
        inputs = (X,) if part == 0 else (H, X)
        ranges = [ProfileRange(*((size, WIDTH) for size in sizes)) for sizes in PROFILES]
        profiles = tuple({spec.name: item for spec in inputs} for item in ranges)
        outputs = ((H, Y)[part],)
        engines.append(EngineSpec(file, trt.__name__, trt.__version__, targets, part, inputs, outputs, profiles))
    names = ["tokenizer.json", f"{MODULE}.safetensors"]
    for name in names:
        (folder / name).touch()
    names += [engine.file for engine in engines]
    module = ModuleSpec((X,), (Y,), "fp32", None, f"{MODULE}.safetensors", {}, engines=tuple(engines))
    size = ShapeRange(16, 16, 16)
    manifest = Manifest(
        name="plans",
        precision="fp32",
        producer={},
        source={},
        pipeline=PipelineSpec(16, 8, 32, 16, 3.0, "", "", 8, 0.0),
        shapes=ShapeRanges(ShapeRange(1, 2, 32), size, size, ShapeRange(1, 1, 1)),
        tokenizer="tokenizer.json",
        modules={MODULE: module},
        files={name: hash_file(folder / name) for name in names},
    )
    write_manifest(manifest, folder)
    return manifest


def with_engines(manifest: Manifest, *engines: EngineSpec) -> Manifest:
    """The manifest with other engines of its module."""
    module = dataclasses.replace(manifest.modules[MODULE], engines=engines)
    return dataclasses.replace(manifest, modules={MODULE: module})
