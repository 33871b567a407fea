"""Measures exported modules in ONNX Runtime against diffusers' and transformers' own models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from zimage_rt.backends.onnxruntime import exact_products
from zimage_rt.bundle.manifest import Parity, ParityCase, TensorSpec

from ..errors import ParityError
from ..plan import ModulePlan
from .reference import Reference

# Largest relative error of a module per precision, ||out - reference|| / ||reference||.
TOLERANCES = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 3e-2, "int8": 0.1}

# Shapes that reveal constant sizes in a graph: odd aspect ratios, image rows with and without padding, prompt lengths
# around a multiple of 32.
_PROMPTS = (
    {"batch": 1, "prompt_tokens": 1},
    {"batch": 2, "prompt_tokens": 31},
    {"batch": 1, "prompt_tokens": 32},
    {"batch": 1, "prompt_tokens": 33},
)
_LATENTS = (
    {"batch": 1, "latent_height": 32, "latent_width": 32},
    {"batch": 2, "latent_height": 12, "latent_width": 20},
    {"batch": 1, "latent_height": 26, "latent_width": 140},
)
_STEPS = tuple({**case, "context_tokens": 32 * (i + 1)} for i, case in enumerate(_LATENTS))
CASES: Mapping[str, tuple[Mapping[str, int], ...]] = {
    "text_encoder": _PROMPTS,
    "context_refiner": _PROMPTS,
    "transformer": _STEPS,
    "controlnet": _STEPS,
    "decoder": _LATENTS[:1] + _LATENTS[2:],
    "encoder": (
        {"batch": 2, "height": 64, "width": 96},
        {"batch": 1, "height": 208, "width": 1120},
    ),
}


def sample(spec: TensorSpec, sizes: Mapping[str, int], vocabulary: int, seed: int) -> np.ndarray:
    """A random input of a parity run."""
    shape = [sizes[dim] if isinstance(dim, str) else dim for dim in spec.dims]
    random = np.random.default_rng(seed)
    if spec.dtype == "int64":
        return random.integers(0, vocabulary, shape)
    if spec.name in ("timestep", "control_scale"):
        return random.uniform(0, 1, shape).astype(np.float32)
    if spec.name == "image":
        return random.uniform(-1, 1, shape).astype(np.float32)
    return random.standard_normal(shape, dtype=np.float32)


def session(graph: Path) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on the CPU, as the bundle's default backend uses."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    for key, value in exact_products().items():
        options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def measure(plan: ModulePlan, graph: Path, reference: Reference, reference_name: str) -> Parity:
    """Compares an exported module with its reference at several shapes.

    Raises:
        ParityError: an error exceeds the tolerance.
    """
    tolerance = TOLERANCES[plan.precision.name]
    run = session(graph)
    kind = plan.name if plan.name in CASES else plan.name.rpartition("_")[2]
    cases = []
    for seed, sizes in enumerate(CASES[kind]):
        vocabulary = int(plan.config.get("vocab_size", 1))
        arrays = {spec.name: sample(spec, sizes, vocabulary, seed) for spec in plan.inputs}
        with torch.no_grad():
            wanted = reference(*(torch.from_numpy(array) for array in arrays.values())).numpy()
        got = run.run(None, arrays)[0]
        if got.shape != wanted.shape:
            raise ParityError(f"{plan.name} at {dict(sizes)}: shape {got.shape}, the reference has {wanted.shape}")
        difference = got.astype(np.float64) - wanted
        error = float(np.linalg.norm(difference) / np.linalg.norm(wanted.astype(np.float64)))
        peak = float(np.abs(difference).max())
        if not error <= tolerance:  # also fails for NaN
            raise ParityError(
                f"{plan.name} at {dict(sizes)}: relative error {error:.3g}, largest {peak:.3g}; "
                f"tolerated in {plan.precision.name}: {tolerance:g} (reference: {reference_name})"
            )
        cases.append(ParityCase(dict(sizes), error, peak))
    runtime = f"onnxruntime {onnxruntime.__version__} CPUExecutionProvider"
    return Parity(reference_name, runtime, tolerance, tuple(cases))
