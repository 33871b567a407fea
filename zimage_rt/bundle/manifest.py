"""The manifest: the one seam between export and serve.

A bundle is a folder with `manifest.json` and the files it names. The exporter writes the manifest last, and the engine
reads nothing that the manifest does not name. Every dataclass here is frozen, and every reader rejects unknown keys:
a typo or a file from a newer version is an error, never a silently ignored setting.
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
from .modules import MODULES

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
PRECISIONS = ("fp32", "fp16", "bf16")

# What to do about a manifest that cannot be read.
_AGAIN = "export the bundle again"
_NEWER = "a newer zimage_rt may have written it: upgrade, or export the bundle again"

Dim = int | str


def shape_text(dims: tuple[Any, ...]) -> str:
    """`[batch, 16, 128, 128]`: how shapes are written in every message."""
    return "[" + ", ".join(str(dim) for dim in dims) + "]"


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One tensor at a module's border.

    Attributes:
        name: the ONNX graph's own name for it.
        dtype: numpy name, e.g. `float32` or `int64`.
        dims: fixed sizes as integers, free ones as the names that `ShapeRanges.of` knows.
    """

    name: str
    dtype: str
    dims: tuple[Dim, ...]


@dataclasses.dataclass(frozen=True)
class ShapeRange:
    """What one free size may be: `min <= size <= max`, a multiple of `multiple`; `opt` is what to tune for."""

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
        """The range of `size * numerator / denominator` (sizes that divide evenly stay exact)."""

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
    """The sizes a bundle serves. Heights and widths are pixels; `prompt_tokens` includes the chat template."""

    batch: ShapeRange
    height: ShapeRange
    width: ShapeRange
    prompt_tokens: ShapeRange

    def of(self, symbol: str, pipeline: PipelineSpec) -> ShapeRange:
        """The range of a named dim of a `TensorSpec`."""
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
    """What the loop around the modules needs to know of the checkpoint.

    Attributes:
        latent_channels, vae_scale_factor: latents are `[batch, latent_channels, height / f, width / f]`.
        sequence_multiple: caption rows are padded to a multiple of this before the transformer.
        size_multiple: heights and widths are multiples of this (vae_scale_factor * patch size).
        shift: the flow-match scheduler's timestep shift.
        prompt_prefix, prompt_suffix: the chat template around a user's prompt.
        num_inference_steps, guidance_scale: what a request gets if it does not say.
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

    `relative_error` is ||out - ref|| / ||ref|| over all outputs; `shapes` are the free sizes used.
    """

    shapes: Mapping[str, int]
    relative_error: float
    max_abs_error: float


@dataclasses.dataclass(frozen=True)
class Parity:
    """The evidence that a module computes what its reference computes; `runtime` ran the export."""

    reference: str
    runtime: str
    tolerance: float
    cases: tuple[ParityCase, ...]


@dataclasses.dataclass(frozen=True)
class ProfileRange:
    """What one input of an engine may be under one optimisation profile: whole shapes, as TensorRT has them."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class EngineSpec:
    """One compiled plan of a module. A module that was split has several, which run in order.

    Attributes:
        file: the plan inside the bundle. A plan is a program: it is loaded only if its hash stands in the manifest.
        backend: what built it and alone can run it: `tensorrt` or `tensorrt_rtx`.
        version: the library's, e.g. `1.7.1.116`; plans serve no other.
        compute_capabilities: the GPUs it was built for, e.g. `8.6`.
        part: from 0; where a module is split, outputs of one part are inputs of the next by name.
        inputs, outputs: its border, which is the module's own where there is one part.
        profiles: by input name, one mapping an optimisation profile.
        stripped: whether the weights are left out and refitted from the module's safetensors file at load.
        activation_bytes: device memory that one execution needs beside weights, as the builder says; 0 if it does not.
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
    """Where a linear layer of the checkpoint lies in a module's weights.

    Attributes:
        tensor: the stored matrix, `[in_features, columns of every layer that it holds]`.
        first_column, columns: the layer's own columns, its outputs.
        head_dim: > 0 where the outputs of each head of that width are stored as halves, (0, 2, 4, …, 1, 3, 5, …);
            0 where they are in the checkpoint's order.
    """

    tensor: str
    in_features: int
    first_column: int
    columns: int
    head_dim: int = 0


@dataclasses.dataclass(frozen=True)
class ModuleSpec:
    """One module of a bundle: its border, its files, the architecture its weights belong to, its parity.

    Attributes:
        precision: `fp32`, `fp16` or `bf16`: what weights are stored and products computed in.
        graph, weights: file names inside the bundle; the ONNX graph names the safetensors file as its external data.
            A bundle for the `cuda` backend alone may have no graph.
        config: architecture numbers from the checkpoint (read by backends that run no ONNX graph).
        parity: None only where the exporter was told to skip it.
        engines: compiled plans, none where a backend runs the graph or the weights themselves.
        linears: the checkpoint's linear layers by its own names (`layers.0.attention.to_q`): what a LoRA changes.
        base: another module whose weight file it reads too, under that module's names: a `controlnet` is the whole
            transformer with the ControlNet beside it, and its own file has the ControlNet alone.
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
    """All a bundle says of itself.

    Attributes:
        name: what people call it, e.g. `zimage-nano`.
        precision: the recipe's precision; a module may differ (see `ModuleSpec.precision`).
        producer: versions of what wrote it.
        source: where the weights came from: format, file names and their hashes.
        modules: by name: text_encoder, context_refiner, transformer, {tiny,full}_vae_{decoder,encoder}; controlnet
            where there is one.
        files: every file but the manifest itself.
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
        """Sixteen hex digits that name this bundle's content: any changed file or setting changes it."""
        canonical = json.dumps(to_json(self), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def module(self, name: str) -> ModuleSpec:
        """The named module; raises BundleMismatch with the ones there are."""
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
    """Read `bundle/manifest.json`. Raises ManifestError."""
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
    """What of a manifest contradicts itself, or leads out of its folder."""
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
    """Whether a name is that of a file in the bundle's folder or below, on any system."""
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
    """Write `bundle/manifest.json`; the last file of a bundle to be written."""
    text = json.dumps(to_json(manifest), indent=1, ensure_ascii=False)
    (bundle / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")
