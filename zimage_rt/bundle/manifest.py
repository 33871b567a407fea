"""The manifest: the only interface between export and serving.

A bundle is a folder with `manifest.json` and the files it names. The exporter writes the manifest last, and the engine
reads no file that the manifest does not name. Every dataclass here is frozen, and unknown keys are rejected: a typo or
a file of a newer version is an error, never a silently ignored setting.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import BundleMismatch, ManifestError
from .json_codec import from_json, parse_json, to_json
from .modules import MODULES, VAES, vae_decoder

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")

# Advice for manifests that cannot be read.
_AGAIN = "export the bundle again"
_NEWER = "a newer zimage_rt may have written it: upgrade, or export the bundle again"

Dim = int | str


def shape_text(dims: tuple[Any, ...]) -> str:
    """A shape for messages, such as `[batch, 16, 128, 128]`."""
    return "[" + ", ".join(str(dim) for dim in dims) + "]"


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """An input or output of a module.

    Attributes:
        name: its name in the ONNX graph.
        dtype: its numpy name, e.g. `float32` or `int64`.
        dims: fixed sizes as integers, dynamic ones as names of `ShapeRanges.of`.
    """

    name: str
    dtype: str
    dims: tuple[Dim, ...]


@dataclasses.dataclass(frozen=True)
class ShapeRange:
    """The range of a dynamic size: `min <= size <= max`, a multiple of `multiple`; builders tune for `opt`."""

    min: int
    opt: int
    max: int
    multiple: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.min <= self.opt <= self.max:
            raise ManifestError(f"shape range: expected 0 < min <= opt <= max, got {self.min}, {self.opt}, {self.max}")
        for value in (self.min, self.opt, self.max):
            if self.multiple < 1 or value % self.multiple:
                raise ManifestError(f"shape range: expected multiples of {self.multiple}, got {value}; round it")

    def __contains__(self, size: object) -> bool:
        return isinstance(size, int) and self.min <= size <= self.max and size % self.multiple == 0

    def scaled(self, numerator: int, denominator: int = 1) -> ShapeRange:
        """The range of `size * numerator / denominator`, rounded down."""

        def scale(value: int) -> int:
            return value * numerator // denominator

        return ShapeRange(
            scale(self.min),
            scale(self.opt),
            scale(self.max),
            max(1, scale(self.multiple)),
        )

    def rounded_up(self, multiple: int) -> ShapeRange:
        """The range of `ceil(size / multiple) * multiple`."""
        low, opt, high = (-(-value // multiple) * multiple for value in (self.min, self.opt, self.max))
        return ShapeRange(low, opt, high, multiple)


@dataclasses.dataclass(frozen=True)
class ShapeRanges:
    """The sizes that a bundle serves; heights and widths are in pixels, `prompt_tokens` include the chat template."""

    batch: ShapeRange
    height: ShapeRange
    width: ShapeRange
    prompt_tokens: ShapeRange

    def of(self, symbol: str, pipeline: PipelineSpec) -> ShapeRange:
        """The range of a named dim of a `TensorSpec`. Raises ManifestError for an unknown name."""
        if symbol in ("batch", "height", "width", "prompt_tokens"):
            return getattr(self, symbol)
        if symbol == "latent_height":
            return self.height.scaled(1, pipeline.vae_scale_factor)
        if symbol == "latent_width":
            return self.width.scaled(1, pipeline.vae_scale_factor)
        if symbol == "context_tokens":
            return self.prompt_tokens.rounded_up(pipeline.sequence_multiple)
        raise ManifestError(
            f"unknown dim {symbol!r}; known: batch, height, width, prompt_tokens, "
            "latent_height, latent_width, context_tokens"
        )


@dataclasses.dataclass(frozen=True)
class PipelineSpec:
    """The checkpoint's constants for the pipeline around the modules.

    Attributes:
        latent_channels, vae_scale_factor: latents are `[batch, latent_channels, height / f, width / f]`.
        sequence_multiple: caption tokens are padded to a multiple of this before the transformer.
        size_multiple: heights and widths are multiples of this (vae_scale_factor * patch size).
        shift: the flow-match scheduler's timestep shift.
        prompt_prefix, prompt_suffix: the chat template around a user's prompt.
        num_inference_steps, guidance_scale: defaults of a request.
    """

    latent_channels: int
    vae_scale_factor: int
    sequence_multiple: int
    size_multiple: int
    shift: float
    prompt_prefix: str
    prompt_suffix: str
    num_inference_steps: int
    guidance_scale: float


@dataclasses.dataclass(frozen=True)
class ParityCase:
    """One comparison of an exported module with its reference implementation.

    `relative_error` is ||out - ref|| / ||ref|| over all outputs; `shapes` are the dynamic sizes of the run.
    """

    shapes: Mapping[str, int]
    relative_error: float
    max_abs_error: float


@dataclasses.dataclass(frozen=True)
class Parity:
    """The comparisons of a module with its reference; `runtime` ran the exported module."""

    reference: str
    runtime: str
    tolerance: float
    cases: tuple[ParityCase, ...]


@dataclasses.dataclass(frozen=True)
class ProfileRange:
    """The shapes of an engine's input under one optimisation profile of TensorRT."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class EngineSpec:
    """A compiled plan of a module. A module that was split has several, which run in order.

    Attributes:
        file: the plan's name in the bundle. A plan is a program: it is loaded only if the manifest has its hash.
        backend: the library that built it and can run it: `tensorrt` or `tensorrt_rtx`.
        version: the library's version, e.g. `1.7.1.116`; no other version runs the plan.
        compute_capabilities: the GPUs it was built for, e.g. `8.6`.
        part: its number, from 0; in a split module, outputs of a part are inputs of later parts, by name.
        inputs, outputs: its tensors, which are the module's own if there is one part.
        profiles: one mapping per optimisation profile, by input name.
        stripped: whether the plan has no weights and is refitted from the module's safetensors file at load.
        activation_bytes: device memory per execution beside weights, by the builder; 0 if unknown.
    """

    file: str
    backend: str
    version: str
    compute_capabilities: tuple[str, ...]
    part: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[Mapping[str, ProfileRange], ...]
    stripped: bool = False
    activation_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class LinearPlace:
    """The location of a linear layer of the checkpoint in a module's weights.

    Attributes:
        tensor: the stored matrix, `[in_features, columns of all packed layers]`.
        first_column, columns: the layer's columns, which are its outputs.
        head_dim: > 0 if the outputs of each head of that width are stored as halves, (0, 2, 4, …, 1, 3, 5, …);
            0 if they are in the checkpoint's order.
    """

    tensor: str
    in_features: int
    first_column: int
    columns: int
    head_dim: int = 0


@dataclasses.dataclass(frozen=True)
class ModuleSpec:
    """A module of a bundle: its inputs and outputs, files, architecture and parity.

    Attributes:
        precision: `fp32`, `fp16` or `bf16`, the format of the stored weights and of the products.
        graph, weights: file names in the bundle; the ONNX graph names the safetensors file as its external data.
            A bundle for the `cuda` backend alone may have no graph.
        config: architecture numbers from the checkpoint, for backends that run no ONNX graph.
        parity: None only if the exporter skipped it on request.
        engines: compiled plans; empty for backends that run the graph or the weights themselves.
        linears: the checkpoint's linear layers by its own names (`layers.0.attention.to_q`), which LoRAs change.
        base: another module whose weight file it reads too: a `controlnet` is the whole transformer and the
            ControlNet, and its own file has only the ControlNet.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    precision: str
    graph: str | None
    weights: str
    config: Mapping[str, Any]
    parity: Parity | None = None
    engines: tuple[EngineSpec, ...] = ()
    linears: Mapping[str, LinearPlace] = dataclasses.field(default_factory=dict)
    base: str | None = None


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 (hex) of one file of a bundle."""

    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The manifest of a bundle.

    Attributes:
        name: the bundle's name, e.g. `zimage-nano`.
        precision: the recipe's precision; a module may differ (see `ModuleSpec.precision`).
        producer: versions of the exporter and its libraries.
        source: the origin of the weights: format, file names and their hashes.
        modules: by name: text_encoder, context_refiner, transformer, {tiny,full}_vae_{decoder,encoder}, and controlnet
            if there is one.
        files: every file except the manifest itself.
    """

    name: str
    precision: str
    producer: Mapping[str, str]
    source: Mapping[str, Any]
    pipeline: PipelineSpec
    shapes: ShapeRanges
    tokenizer: str
    modules: Mapping[str, ModuleSpec]
    files: Mapping[str, FileEntry]
    schema_version: int = SCHEMA_VERSION

    @property
    def bundle_id(self) -> str:
        """Sixteen hex digits that identify the bundle's content; any changed file or setting changes them."""
        canonical = json.dumps(to_json(self), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    @property
    def default_vae(self) -> str:
        """The VAE of a request that names none: the tiny one if the bundle has it.

        A bundle for the `cuda` backend alone, whose full VAE has neither a graph nor plans, takes the full one: its
        images are those of diffusers, for a few hundredths of a second.
        """
        full = self.modules.get(vae_decoder("full"))
        if full is not None and full.graph is None and not full.engines:
            return "full"
        return next((vae for vae in VAES if vae_decoder(vae) in self.modules), "tiny")

    def module(self, name: str) -> ModuleSpec:
        """The named module. Raises BundleMismatch, with the known names, if there is none."""
        if name not in self.modules:
            raise BundleMismatch(
                f"module {name!r} is not in this bundle; it has: {', '.join(sorted(self.modules))}. "
                "Export it again with that module in the recipe"
            )
        return self.modules[name]

    def module_files(self, name: str) -> tuple[str, ...]:
        """The files that the named module reads."""
        module = self.module(name)
        own = (module.weights,) if module.graph is None else (module.graph, module.weights)
        return own if module.base is None else (*own, self.module(module.base).weights)


def read_manifest(bundle: Path) -> Manifest:
    """Read and check `bundle/manifest.json`. Raises ManifestError."""
    path = bundle / MANIFEST_NAME
    try:
        data = parse_json(path.read_bytes())
    except FileNotFoundError:
        what = "the folder has no manifest.json" if bundle.is_dir() else "there is no such folder"
        raise ManifestError(f"{bundle} is not a bundle: {what}. Make one with: zimage-export RECIPE.toml") from None
    except NotADirectoryError:
        raise ManifestError(f"{bundle} is a file; expected a bundle's folder, which zimage-export makes") from None
    except (OSError, ValueError) as error:
        raise ManifestError(f"{path} cannot be read: {error}. It was damaged: export the bundle again") from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if not isinstance(version, int) or isinstance(version, bool):
        raise ManifestError(f"{path}: no schema_version; this is not a zimage_rt manifest")
    if version != SCHEMA_VERSION:
        todo = "upgrade zimage_rt" if version > SCHEMA_VERSION else _AGAIN
        raise ManifestError(f"{path}: expected schema {SCHEMA_VERSION}, got {version}; {todo}")
    manifest = from_json(Manifest, data, MANIFEST_NAME, ManifestError, _NEWER)
    for problem in _problems(manifest):
        raise ManifestError(f"{path}: {problem}; {_AGAIN}")
    return manifest


def _problems(manifest: Manifest) -> Iterator[str]:
    """The contradictions in a manifest, and paths that are outside the bundle's folder, one sentence each."""
    for name, entry in manifest.files.items():
        if not _is_inside(name) or name == MANIFEST_NAME:
            yield f"files: expected names of files inside the bundle, got {name!r}"
        if entry.size < 0 or not re.fullmatch(r"[0-9a-f]{64}", entry.sha256):
            yield f"files.{name}: expected a size and a SHA-256 of 64 hex digits, got {entry.size}, {entry.sha256!r}"
    used = {"tokenizer": manifest.tokenizer}
    for name, module in manifest.modules.items():
        used |= {f"modules.{name}.weights": module.weights}
        used |= {} if module.graph is None else {f"modules.{name}.graph": module.graph}
        used |= {f"modules.{name}.engines[{i}].file": engine.file for i, engine in enumerate(module.engines)}
        yield from (f"modules.{name}.{problem}" for problem in _module_problems(name, module, manifest))
    for where, name in used.items():
        if name not in manifest.files:
            yield f"{where}: expected one of the files, got {name!r}"
    if manifest.precision not in PRECISIONS:
        yield f"precision: expected one of {', '.join(PRECISIONS)}, got {manifest.precision!r}"
    yield from (f"pipeline.{problem}" for problem in _pipeline_problems(manifest.pipeline))


def _is_inside(name: str) -> bool:
    """Whether a name is of a file in the bundle's folder or its subfolders, on any system."""
    parts = name.split("/")
    return not re.search(r"[\x00-\x1f\\:]", name) and all(part.strip(" .") for part in parts)


def _module_problems(name: str, module: ModuleSpec, manifest: Manifest) -> Iterator[str]:
    if module.precision not in PRECISIONS:
        yield f"precision: expected one of {', '.join(PRECISIONS)}, got {module.precision!r}"
    base = module.base
    if base is not None and (base not in manifest.modules or manifest.modules[base].base is not None):
        yield f"base: expected a module with weights of its own, got {base!r}"
    if name in MODULES:
        for side in ("inputs", "outputs"):
            wanted = getattr(MODULES[name], side)
            found = tuple(tensor.name for tensor in getattr(module, side))
            if found != wanted:
                yield f"{side}: expected {', '.join(wanted)}, got {', '.join(found) or 'none'}"
    for tensor in (*module.inputs, *module.outputs):
        for dim in tensor.dims:
            if isinstance(dim, str):
                manifest.shapes.of(dim, manifest.pipeline)
            elif dim < 1:
                yield f"{tensor.name}: expected sizes of 1 or more, got {dim}"
    for layer, place in module.linears.items():
        if min(place.in_features, place.columns) < 1 or min(place.first_column, place.head_dim) < 0:
            yield f"linears.{layer}: expected sizes of 1 or more, from a column of 0 or more"


def _pipeline_problems(pipeline: PipelineSpec) -> Iterator[str]:
    for name in ("latent_channels", "vae_scale_factor", "sequence_multiple", "size_multiple", "num_inference_steps"):
        if not 1 <= getattr(pipeline, name) <= 1 << 20:
            yield f"{name}: expected 1 to {1 << 20}, got {getattr(pipeline, name)}"
    if pipeline.size_multiple % pipeline.vae_scale_factor:
        yield f"size_multiple: expected a multiple of {pipeline.vae_scale_factor}, got {pipeline.size_multiple}"
    if not (pipeline.shift > 0 and math.isfinite(pipeline.shift)):
        yield f"shift: expected more than 0, got {pipeline.shift}"
    if pipeline.guidance_scale < 0:
        yield f"guidance_scale: expected 0 or more, got {pipeline.guidance_scale}"


def write_manifest(manifest: Manifest, bundle: Path) -> None:
    """Write `bundle/manifest.json`, which is the last file of a bundle to be written."""
    text = json.dumps(to_json(manifest), indent=1, ensure_ascii=False)
    (bundle / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")
