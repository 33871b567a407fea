"""Matches the layers of a LoRA's file to the stored tensors of a bundle's modules."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..bundle.manifest import LinearPlace, Manifest
from ..bundle.modules import LORA_MODULES
from ..bundle.quantized import QUANTIZED, dequantized
from ..bundle.safetensors_file import TensorFile, widen
from ..errors import LoraError
from .file import LoraFile
from .kinds import seems_to_be
from .layers import Layer, LoraLayer, VectorChange, WholeLayer, same_product
from .names import LayerNames, VectorNames, half_split

# Two copies of one update under different names differ by rounding: bf16 has 8 bits.
_SAME = 0.01
# Lines of a message about a file, without its first and its last.
_MAX_LINES = 8

# The change of some columns of a stored tensor, in the stored order of the columns: `down` float32
# `[rank, in_features]` and `up` float32 `[rank, columns]`, or a function that computes the full change, float32
# `[in_features, columns]`.
Part = tuple[np.ndarray, np.ndarray] | Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class MatchedLora:
    """A LoRA file whose layers are matched to the stored tensors of a bundle.

    Attributes:
        modules: the changes by module, then by (tensor, first column); see `Part`.
        sha256, settings_sha256: hashes of the bytes that were read; see `LoraFile`.
        notes: warnings for the user.
        left_out: the keys that match no layer of the bundle, if that was allowed.
    """

    modules: Mapping[str, Mapping[tuple[str, int], Part]]
    sha256: str = ""
    notes: Sequence[str] = ()
    left_out: Sequence[str] = ()
    settings_sha256: str = ""


class BaseWeights:
    """The bundle's stored weights in fp32, which DoRA, full weights, biases and norms are changes of."""

    def __init__(self, bundle: Path | None, manifest: Manifest) -> None:
        self._bundle, self._manifest = bundle, manifest
        self._files: dict[str, TensorFile] = {}
        self._vectors: VectorNames | None = None

    def columns(self, module: str, tensor: str, first: int, count: int) -> np.ndarray:
        """Columns of a tensor, float32 `[rows, count]`; a vector has one row."""
        file, columns = self._file(module), slice(first, first + count)
        if file.dtype(tensor) in QUANTIZED:
            rotates = bool(self._manifest.module(module).config.get("rotates", False))
            return dequantized(file, tensor, columns, rotates=rotates)
        stored = file.stored(tensor)
        return widen((stored[None] if stored.ndim == 1 else stored)[:, columns])

    def size(self, module: str, tensor: str) -> int:
        """The length of a vector."""
        return self._file(module).shape(tensor)[0]

    @property
    def vectors(self) -> VectorNames:
        """The names of the bundle's biases and norms."""
        if self._vectors is None:
            self._vectors = VectorNames(self._manifest, {module: self._file(module) for module in LORA_MODULES})
        return self._vectors

    def _file(self, module: str) -> TensorFile:
        if self._bundle is None:
            raise LoraError("the bundle's weights are not at hand, and this LoRA is a change of them")
        if module not in self._files:
            self._files[module] = TensorFile(self._bundle / self._manifest.module(module).weights)
        return self._files[module]


def match_layers(file: LoraFile, manifest: Manifest, bundle: Path | None = None, *, strict: bool = True) -> MatchedLora:
    """Match each layer of a file to a stored tensor.

    Args:
        file: the LoRA's file.
        manifest, bundle: the bundle's; its folder is needed for DoRA, full weights, biases and norms.
        strict: whether every layer must match; if False, one is enough, and the others are left out.

    Raises:
        LoraError: the file does not fit, with the reasons in at most ten lines; `keys` are those that match no layer.
    """
    matcher = _Matcher(manifest, bundle)
    problems, bad = list(file.problems), list(file.bad_keys)
    idle: list[str] = []
    for layer in file.layers:
        problem = matcher.match(layer)
        if problem is None:
            continue
        if matcher.names.is_idle(layer.name):
            idle += layer.keys
        else:
            problems.append(f"{_key_list(layer.keys)}: {problem}")
            bad += layer.keys
    used = any(matcher.modules.values())
    if not problems and not used:
        problems.append(f"{_key_list(idle)}: these layers never run, so it changes nothing")
        bad += idle
    if problems and (strict or not used):
        raise LoraError(_refusal(file, manifest, matcher, problems, bad), bad)
    notes = list(file.notes)
    if idle:
        notes.append(f"{len(idle)} tensors belong to layers that never run, and change nothing: {_key_list(idle)}")
    if problems:
        what = f"used {matcher.matched} of {len(file.layers) + len(file.problems)} layers; left out:"
        notes.append("\n  ".join([what, *_lines(problems, _MAX_LINES)]))
    return MatchedLora(matcher.modules, file.sha256, notes, bad, file.settings_sha256)


def _refusal(file: LoraFile, manifest: Manifest, matcher: _Matcher, problems: Sequence[str], bad: Sequence[str]) -> str:
    kind = seems_to_be(bad, bool(file.layers))
    head = f"{file.path}: no LoRA for bundle {manifest.name!r}; nothing of it was used"
    if kind is not None:
        head += f": it seems to be {kind}"
    elif matcher.matched:
        head += f", though {matcher.matched} of its layers fit (strict=False or --lora-partial uses those)"
    last = [f"the bundle's layers: {matcher.names.summary()}"] if matcher.has_unknown_names else []
    return "\n  ".join([f"{head}:", *_lines(problems, _MAX_LINES - len(last)), *last])


def _lines(problems: Sequence[str], limit: int) -> list[str]:
    """At most `limit` problems and the number of the others; one of each sort is listed first."""
    if len(problems) <= limit + 1:
        return list(problems)
    # Problems that differ only in words with digits are of one sort.
    sorts = {re.sub(r"\S*\d\S*", "", problem): problem for problem in reversed(problems)}
    first = [problem for problem in problems if problem in sorts.values()]
    others = [problem for problem in problems if problem not in sorts.values()]
    return [*[*first, *others][:limit], f"… and {len(problems) - limit} more"]


def _key_list(keys: Sequence[str]) -> str:
    return ", ".join(keys if len(keys) < 5 else [*keys[:3], f"… and {len(keys) - 3} more"])


class _Matcher:
    """Matches a file's layers to a bundle's tensors, one after another.

    Attributes:
        modules: the changes that were matched so far.
        matched: the number of matched layers.
        has_unknown_names: whether a layer has a name that is not in the bundle.
    """

    def __init__(self, manifest: Manifest, bundle: Path | None) -> None:
        self.names = LayerNames(manifest)
        self.modules: dict[str, dict[tuple[str, int], Part]] = {}
        self.matched, self.has_unknown_names = 0, False
        self._base = BaseWeights(bundle, manifest)

    def match(self, layer: Layer) -> str | None:
        """Match a layer; returns the problem if it does not match, and then changes nothing."""
        problem = self._vector(layer) if isinstance(layer, VectorChange) else self._matrix(layer)
        self.matched += problem is None
        return problem

    def _matrix(self, layer: LoraLayer | WholeLayer) -> str | None:
        found = self.names.find(layer.name)
        if not found:
            self.has_unknown_names = self.has_unknown_names or not self.names.is_idle(layer.name)
            return "no such layer in this bundle"
        places = [self.names.places[name] for name in found]
        wanted = sum(where.columns for _, where in places)
        inputs = places[0][1].in_features
        if layer.shape != (wanted, inputs):
            if isinstance(layer, LoraLayer):
                expected = f"[rank, {inputs}] and [{wanted}, rank]"
                got = f"{list(layer.down.shape)} and {list(layer.up.shape)}"
            else:
                expected, got = f"a change of [{wanted}, {inputs}]", f"{list(layer.shape)}"
            return f"expected {expected}, got {got}: it is of a model of another size"
        return self._add(
            [(module, where.tensor, where.first_column) for module, where in places], self._parts(layer, places)
        )

    def _vector(self, layer: VectorChange) -> str | None:
        found = self._base.vectors.find(layer.name, layer.part)
        if found is None:
            if self.names.find(layer.name):
                return f"this layer has no {layer.part} in this model"
            self.has_unknown_names = self.has_unknown_names or not self.names.is_idle(layer.name)
            return "no such layer in this bundle"
        module, tensor, head_dim = found
        size = self._base.size(module, tensor)
        if layer.values.shape != (size,):
            return f"expected [{size}], got {list(layer.values.shape)}: it is of a model of another size"
        values = half_split(layer.values, head_dim)[None]
        if layer.replaces:
            values = values - self._base.columns(module, tensor, 0, size)
        return self._add([(module, tensor, 0)], [lambda: values])

    def _add(self, keys: list[tuple[str, str, int]], parts: list[Part]) -> str | None:
        duplicates = [
            (key, part)
            for key, part in zip(keys, parts, strict=True)
            if (key[1], key[2]) in self.modules.get(key[0], {})
        ]
        for (module, tensor, first), part in duplicates:
            if not _is_same_update(self.modules[module][tensor, first], part):
                return "expected each layer once, got it a second time under another name, and not the same"
        for (module, tensor, first), part in zip(keys, parts, strict=True):
            self.modules.setdefault(module, {}).setdefault((tensor, first), part)
        return None

    def _parts(self, layer: LoraLayer | WholeLayer, places: list[tuple[str, LinearPlace]]) -> list[Part]:
        """A layer's change of each tensor that holds a part of it."""
        parts: list[Part] = []
        rows = 0
        for _, where in places:
            parts.append(_part(layer, rows, where))
            rows += where.columns
        if isinstance(layer, WholeLayer) and layer.replaces:
            return [self._minus_base(part, *at) for part, at in zip(parts, places, strict=True)]
        if layer.magnitude is not None:
            return self._with_magnitude(layer.magnitude, parts, places)
        return parts

    def _minus_base(self, part: Part, module: str, where: LinearPlace) -> Part:
        return lambda: whole(part) - self._columns(module, where)

    def _columns(self, module: str, where: LinearPlace) -> np.ndarray:
        return self._base.columns(module, where.tensor, where.first_column, where.columns)

    def _with_magnitude(
        self, magnitude: np.ndarray, parts: Sequence[Part], places: Sequence[tuple[str, LinearPlace]]
    ) -> list[Part]:
        """The changes by DoRA, which scales the rows (or columns) of the changed weight to the magnitudes.

        Stored weights are transposed. They are the checkpoint's even in fp16, whose scales apply to activations.
        """
        merged = [
            self._columns(module, where) + whole(part) for part, (module, where) in zip(parts, places, strict=True)
        ]
        tiny = np.finfo(np.float32).tiny
        by_input = magnitude.shape[1] > 1 or len(magnitude) == 1
        if by_input:  # [1, in]: norms over all outputs of the layer, including those of packed layers
            squares = sum(np.square(matrix, dtype=np.float64).sum(1) for matrix in merged)
            factor = (magnitude[0] / np.maximum(np.sqrt(squares), tiny)).astype(np.float32)[:, None]
            factors = [factor] * len(places)
        else:
            factors, rows = [], 0
            for matrix, (_, where) in zip(merged, places, strict=True):
                own = half_split(magnitude[rows : rows + where.columns, 0], where.head_dim)
                norms = np.sqrt(np.square(matrix, dtype=np.float64).sum(0))
                factors.append((own / np.maximum(norms, tiny)).astype(np.float32)[None])
                rows += where.columns
        return [self._scaled(part, factor, *at) for part, factor, at in zip(parts, factors, places, strict=True)]

    def _scaled(self, part: Part, factor: np.ndarray, module: str, where: LinearPlace) -> Part:
        def make() -> np.ndarray:
            base = self._columns(module, where)
            return (base + whole(part)) * factor - base

        return make


def whole(part: Part) -> np.ndarray:
    """A change as a matrix, float32 `[in_features, columns]`."""
    if isinstance(part, tuple):
        return part[0].T @ part[1]
    return part()


def _part(layer: LoraLayer | WholeLayer, first: int, where: LinearPlace) -> Part:
    """A layer's rows from `first` on, in the stored layout."""
    rows = slice(first, first + where.columns)
    if isinstance(layer, LoraLayer):
        return layer.down, np.ascontiguousarray(half_split(layer.up[rows], where.head_dim).T)
    return lambda: np.ascontiguousarray(half_split(layer.delta()[rows], where.head_dim).T)


def _is_same_update(one: Part, other: Part) -> bool:
    """Whether two changes are equal up to rounding."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return same_product(one, other, _SAME)
    first, second = whole(one), whole(other)
    return bool(np.linalg.norm(first - second) <= _SAME * np.linalg.norm(first))
