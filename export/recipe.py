"""`ExportRecipe`: the settings of an export, from a TOML file and the command line."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zimage_rt.bundle.manifest import ShapeRange, ShapeRanges
from zimage_rt.errors import ManifestError
from zimage_rt.limits import MAX_GUIDANCE, MAX_STEPS

from .checkpoint import CONFIGURED, PARTS
from .errors import RecipeError
from .precision import PRECISIONS
from .tensorrt_options import TensorRTOptions

# Backends that zimage-export builds for; `builders/` has a file for each.
BACKENDS = ("onnxruntime", "cuda", "tensorrt", "tensorrt_rtx")
VAES = ("tiny", "full")
DEFAULT_SHAPES = ShapeRanges(
    batch=ShapeRange(1, 1, 8),
    height=ShapeRange(64, 1024, 2048, 16),
    width=ShapeRange(64, 1024, 2048, 16),
    prompt_tokens=ShapeRange(1, 64, 512),
)
# Light and dark, colours, textures, lettering and flat areas: the wider the ranges, the less is cut off.
CALIBRATION = (
    "a butterfly on a pink background",
    "一个红灯笼，下面写着“新年快乐”，黄色背景",
    "a rocket above a globe, black background",
    "左边是 penguin，右边是 snowman，蓝色背景",
    "a bowl of fruit in bright sunlight, photograph",
    "夜晚的城市街道，霓虹灯",
    "a white cat on white snow",
    "a page of a newspaper in black and white",
)


@dataclasses.dataclass(frozen=True)
class ExportRecipe:
    """Settings of an export.

    Attributes:
        checkpoint: a diffusers folder, or a single `.safetensors` or `.gguf` file.
        out: the bundle's folder.
        name: the bundle's name in the manifest.
        precision: `fp32`, `fp16`, `bf16`, `int8` or `fp8`.
        vae: the VAEs to include, of `tiny` and `full`; None for all that the checkpoint has and the backend runs.
        parts: paths of parts that are not in the checkpoint; a `controlnet` is always given here.
        config: changes to a component's config, for numbers that a single file's tensors do not show.
        shapes: the sizes that the bundle serves.
        num_inference_steps, guidance_scale: a request's defaults.
        parity: whether to compare every module with its reference.
        calibration: prompts that an int8 bundle for ONNX Runtime draws while it is exported, to measure the ranges of
            the tiny VAE's activations; none leaves the VAE in fp32.
        backend: the backend to export for: `onnxruntime` has graphs, `cuda` only weights, `tensorrt` and
            `tensorrt_rtx` graphs and plans.
        tensorrt: options for building plans.
    """

    checkpoint: Path
    out: Path
    name: str
    precision: str = "fp32"
    vae: tuple[str, ...] | None = None
    parts: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    config: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    shapes: ShapeRanges = DEFAULT_SHAPES
    num_inference_steps: int = 8
    guidance_scale: float = 0.0
    parity: bool = True
    calibration: tuple[str, ...] = CALIBRATION
    backend: str = "onnxruntime"
    tensorrt: TensorRTOptions = dataclasses.field(default_factory=TensorRTOptions)

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise RecipeError(f"precision: expected one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.backend not in BACKENDS:
            raise RecipeError(f"backend: expected one of {', '.join(BACKENDS)}, got {self.backend!r}")
        for kind in self.vae or ():
            if kind not in VAES:
                raise RecipeError(f"vae: expected any of {', '.join(VAES)}, got {kind!r}")
        for prompt in self.calibration:
            if not isinstance(prompt, str):
                raise RecipeError(f"calibration: expected prompts, got {prompt!r}")
        for part in self.parts:
            if part not in PARTS:
                raise RecipeError(f"parts: expected any of {', '.join(PARTS)}, got {part!r}")
        for component, changes in self.config.items():
            if component not in CONFIGURED:
                raise RecipeError(f"config: expected any of {', '.join(CONFIGURED)}, got {component!r}")
            if not isinstance(changes, Mapping):
                raise RecipeError(f"config.{component}: expected a table, got {changes!r}")
        if not 1 <= self.num_inference_steps <= MAX_STEPS:
            raise RecipeError(f"num_inference_steps: expected 1 to {MAX_STEPS}, got {self.num_inference_steps}")
        if not 0 <= self.guidance_scale <= MAX_GUIDANCE:
            raise RecipeError(f"guidance_scale: expected 0 to {MAX_GUIDANCE:g}, got {self.guidance_scale}")


def _reject_unknown(table: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in table:
        if key not in known:
            raise RecipeError(f"{where}: unknown key {key!r}; known: {', '.join(known)}")


def _typed(table: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    value = table[key]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise RecipeError(f"{where}: {key}: expected {kind.__name__}, got {value!r}")
    return value


def _shapes(table: Mapping[str, Any], where: str, section: str, default: ShapeRanges) -> ShapeRanges:
    known = tuple(field.name for field in dataclasses.fields(ShapeRanges))
    _reject_unknown(table, known, f"{where} [{section}]")
    ranges = {name: getattr(default, name) for name in known}
    for name, values in table.items():
        at = f"{where} [{section}.{name}]"
        if not isinstance(values, dict):
            raise RecipeError(f"{at}: expected a table of min, opt, max, got {values!r}")
        _reject_unknown(values, ("min", "opt", "max", "multiple"), at)
        numbers = {key: _typed(values, key, int, at) for key in values}
        try:
            ranges[name] = dataclasses.replace(ranges[name], **numbers)
        except ManifestError as error:
            raise RecipeError(f"{at}: {error}") from error
    return ShapeRanges(**ranges)


def _tensorrt(table: Mapping[str, Any], where: str, shapes: ShapeRanges) -> TensorRTOptions:
    at = f"{where} [tensorrt]"
    kinds = {"sm": list, "split": dict, "profiles": list, "workspace_gb": float, "optimization_level": int}
    _reject_unknown(table, tuple(kinds), at)
    values = {key: _typed(table, key, kind, at) for key, kind in kinds.items() if key in table}
    if "sm" in values:
        values["sm"] = tuple(values["sm"])
    profiles = []
    for i, profile in enumerate(values.pop("profiles", [])):
        section = f"tensorrt.profiles {i + 1}"
        if not isinstance(profile, dict):
            raise RecipeError(f"{where} [{section}]: expected a table, got {profile!r}")
        ranges = _shapes(profile, where, section, shapes)
        for field in dataclasses.fields(ranges):
            inner, outer = getattr(ranges, field.name), getattr(shapes, field.name)
            if not outer.min <= inner.min <= inner.max <= outer.max:
                raise RecipeError(
                    f"{where} [{section}.{field.name}]: expected {outer.min} to {outer.max}, the bundle's own range, "
                    f"got {inner.min} to {inner.max}"
                )
        profiles.append(ranges)
    return TensorRTOptions(**values, profiles=tuple(profiles))


def read_recipe(path: Path) -> ExportRecipe:
    """Reads a recipe; relative paths start at its folder.

    Raises:
        RecipeError: no such file, not TOML, an unknown key or a wrong type.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"{path} cannot be read: {error}") from error
    where, base = path.name, path.resolve().parent
    known = tuple(field.name for field in dataclasses.fields(ExportRecipe))
    _reject_unknown(table, known, where)
    if "checkpoint" not in table:
        raise RecipeError(f"{where}: `checkpoint` is missing")
    values: dict[str, Any] = {
        key: _typed(table, key, kind, where)
        for key, kind in (
            ("name", str),
            ("precision", str),
            ("backend", str),
            ("num_inference_steps", int),
            ("guidance_scale", float),
            ("parity", bool),
        )
        if key in table
    }
    values["checkpoint"] = base / _typed(table, "checkpoint", str, where)
    values["out"] = base / (_typed(table, "out", str, where) if "out" in table else path.stem)
    values.setdefault("name", path.stem)
    if "vae" in table:
        values["vae"] = tuple(_typed(table, "vae", list, where))
    if "calibration" in table:
        values["calibration"] = tuple(_typed(table, "calibration", list, where))
    if "parts" in table:
        parts = _typed(table, "parts", dict, where)
        values["parts"] = {key: base / _typed(parts, key, str, f"{where} [parts]") for key in parts}
    if "config" in table:
        values["config"] = _typed(table, "config", dict, where)
    if "shapes" in table:
        values["shapes"] = _shapes(_typed(table, "shapes", dict, where), where, "shapes", DEFAULT_SHAPES)
    if "tensorrt" in table:
        shapes = values.get("shapes", DEFAULT_SHAPES)
        values["tensorrt"] = _tensorrt(_typed(table, "tensorrt", dict, where), where, shapes)
    return ExportRecipe(**values)
