"""LoRAs on a live engine: where a file's layers lie in a bundle, several at once with weights, taken off again.

The modules' weights are always the bundle's plus the sum of the LoRAs that are on, made anew from the bundle's file at
every change: nothing is subtracted, so what is left when all are off is the bundle's own bytes.
"""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..backends.base import Change, Dense, LowRank, Pipeline
from ..bundle.manifest import LinearPlace, Manifest
from ..bundle.modules import LORA_MODULES
from ..bundle.safetensors_file import TensorFile, widen
from ..errors import LoraError, LoraWarning, OutOfMemory, RequestError
from ..rwlock import FairRWLock
from .file import LoraFile, is_folder, read_lora
from .kinds import seems_to_be
from .layers import Layer, LoraLayer, VectorChange, WholeLayer, same_product
from .names import LayerNames, VectorNames, half_split

# Two writings of the same update differ by their roundings: bf16 has 8 bits.
_SAME = 0.01
# Lines of a message about a file, beside its first and its last.
_MAX_LINES = 8

# What a layer does to some columns of a stored tensor, in the stored order of the columns: `down` float32
# `[rank, in_features]` and `up` float32 `[rank, columns]`, or what makes the whole change, float32
# `[in_features, columns]`.
Part = tuple[np.ndarray, np.ndarray] | Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class PlacedLora:
    """A file's layers as the modules hold them: by module, then by (tensor, first column).

    Attributes:
        modules: see `Part`.
        sha256, settings_sha256: of the file's bytes, as they were read; see `LoraFile`.
        notes: what to tell of it.
        left_out: the keys that have no place in the bundle, where that was allowed.
    """

    modules: Mapping[str, Mapping[tuple[str, int], Part]]
    sha256: str = ""
    notes: Sequence[str] = ()
    left_out: Sequence[str] = ()
    settings_sha256: str = ""


class _BaseWeights:
    """The bundle's own weights in fp32, as they are stored: what DoRA and whole weights are changes of."""

    def __init__(self, bundle: Path | None, manifest: Manifest) -> None:
        self._bundle, self._manifest = bundle, manifest
        self._files: dict[str, TensorFile] = {}
        self._vectors: VectorNames | None = None

    def columns(self, module: str, tensor: str, first: int, count: int) -> np.ndarray:
        """float32 `[rows, count]`; a vector has one row."""
        stored = self._file(module).stored(tensor)
        return widen((stored[None] if stored.ndim == 1 else stored)[:, first : first + count])

    def size(self, module: str, tensor: str) -> int:
        """Numbers of a vector."""
        return self._file(module).shape(tensor)[0]

    @property
    def vectors(self) -> VectorNames:
        """The names of biases and norms."""
        if self._vectors is None:
            self._vectors = VectorNames(self._manifest, {module: self._file(module) for module in LORA_MODULES})
        return self._vectors

    def _file(self, module: str) -> TensorFile:
        if self._bundle is None:
            raise LoraError("the bundle's weights are not at hand, and this LoRA is a change of them")
        if module not in self._files:
            self._files[module] = TensorFile(self._bundle / self._manifest.module(module).weights)
        return self._files[module]


def place(file: LoraFile, manifest: Manifest, bundle: Path | None = None, *, strict: bool = True) -> PlacedLora:
    """Find each layer's place.

    Args:
        file: what was read.
        manifest, bundle: the bundle's; its folder is needed for DoRA, whole weights, biases and norms.
        strict: whether every layer must have one; without, one is enough, and the others are left out.

    Raises:
        LoraError: in ten lines at most, why the file does not fit; `keys` are all that have no place.
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
            problems.append(f"{_some(layer.keys)}: {problem}")
            bad += layer.keys
    used = any(matcher.modules.values())
    if not problems and not used:
        problems.append(f"{_some(idle)}: these layers never run, so it changes nothing")
        bad += idle
    if problems and (strict or not used):
        raise LoraError(_refusal(file, manifest, matcher, problems, bad), bad)
    notes = list(file.notes)
    if idle:
        notes.append(f"{len(idle)} tensors belong to layers that never run, and change nothing: {_some(idle)}")
    if problems:
        what = f"used {matcher.matched} of {len(file.layers) + len(file.problems)} layers; left out:"
        notes.append("\n  ".join([what, *_lines(problems, _MAX_LINES)]))
    return PlacedLora(matcher.modules, file.sha256, notes, bad, file.settings_sha256)


def _refusal(file: LoraFile, manifest: Manifest, matcher: _Matcher, problems: Sequence[str], bad: Sequence[str]) -> str:
    kind = seems_to_be(bad, bool(file.layers))
    head = f"{file.path}: no LoRA for bundle {manifest.name!r}; nothing of it was used"
    if kind is not None:
        head += f": it seems to be {kind}"
    elif matcher.matched:
        head += f", though {matcher.matched} of its layers fit (strict=False or --lora-partial uses those)"
    last = [f"the bundle's layers: {matcher.names.summary()}"] if matcher.lost else []
    return "\n  ".join([f"{head}:", *_lines(problems, _MAX_LINES - len(last)), *last])


def _lines(problems: Sequence[str], limit: int) -> list[str]:
    """At most `limit` problems and how many more there are; the first of each sort come first."""
    if len(problems) <= limit + 1:
        return list(problems)
    sorts = {re.sub(r"\S*\d\S*", "", problem): problem for problem in reversed(problems)}
    first = [problem for problem in problems if problem in sorts.values()]
    others = [problem for problem in problems if problem not in sorts.values()]
    return [*[*first, *others][:limit], f"… and {len(problems) - limit} more"]


def _some(keys: Sequence[str]) -> str:
    return ", ".join(keys if len(keys) < 5 else [*keys[:3], f"… and {len(keys) - 3} more"])


class _Matcher:
    """Puts a file's layers into a bundle's modules, one after the other.

    Attributes:
        modules: what has a place so far.
        matched: how many layers have one.
        lost: whether one has a name that the bundle does not know.
    """

    def __init__(self, manifest: Manifest, bundle: Path | None) -> None:
        self.names = LayerNames(manifest)
        self.modules: dict[str, dict[tuple[str, int], Part]] = {}
        self.matched, self.lost = 0, False
        self._base = _BaseWeights(bundle, manifest)

    def match(self, layer: Layer) -> str | None:
        """Give a layer its place, or say why it has none; then nothing has changed."""
        problem = self._vector(layer) if isinstance(layer, VectorChange) else self._matrix(layer)
        self.matched += problem is None
        return problem

    def _matrix(self, layer: LoraLayer | WholeLayer) -> str | None:
        found = self.names.find(layer.name)
        if not found:
            self.lost = self.lost or not self.names.is_idle(layer.name)
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
        return self._put(
            [(module, where.tensor, where.first_column) for module, where in places], self._parts(layer, places)
        )

    def _vector(self, layer: VectorChange) -> str | None:
        found = self._base.vectors.find(layer.name, layer.part)
        if found is None:
            if self.names.find(layer.name):
                return f"this layer has no {layer.part} in this model"
            self.lost = self.lost or not self.names.is_idle(layer.name)
            return "no such layer in this bundle"
        module, tensor, head_dim = found
        size = self._base.size(module, tensor)
        if layer.values.shape != (size,):
            return f"expected [{size}], got {list(layer.values.shape)}: it is of a model of another size"
        values = half_split(layer.values, head_dim)[None]
        if layer.replaces:
            values = values - self._base.columns(module, tensor, 0, size)
        return self._put([(module, tensor, 0)], [lambda: values])

    def _put(self, keys: list[tuple[str, str, int]], parts: list[Part]) -> str | None:
        again = [
            (key, part)
            for key, part in zip(keys, parts, strict=True)
            if (key[1], key[2]) in self.modules.get(key[0], {})
        ]
        for (module, tensor, first), part in again:
            if not _same(self.modules[module][tensor, first], part):
                return "expected each layer once, got it a second time under another name, and not the same"
        for (module, tensor, first), part in zip(keys, parts, strict=True):
            self.modules.setdefault(module, {}).setdefault((tensor, first), part)
        return None

    def _parts(self, layer: LoraLayer | WholeLayer, places: list[tuple[str, LinearPlace]]) -> list[Part]:
        """A layer's change of each of its places."""
        parts: list[Part] = []
        rows = 0
        for _, where in places:
            parts.append(_part(layer, rows, where))
            rows += where.columns
        if isinstance(layer, WholeLayer) and layer.replaces:
            return [self._less_base(part, *at) for part, at in zip(parts, places, strict=True)]
        if layer.magnitude is not None:
            return self._decomposed(layer.magnitude, parts, places)
        return parts

    def _less_base(self, part: Part, module: str, where: LinearPlace) -> Part:
        return lambda: whole(part) - self._columns(module, where)

    def _columns(self, module: str, where: LinearPlace) -> np.ndarray:
        return self._base.columns(module, where.tensor, where.first_column, where.columns)

    def _decomposed(
        self, magnitude: np.ndarray, parts: Sequence[Part], places: Sequence[tuple[str, LinearPlace]]
    ) -> list[Part]:
        """DoRA: the changed weight, its rows (or columns) scaled to the magnitudes; stored, it is transposed.

        Z-Image's fp16 scales lie in activations, so the stored weights are the checkpoint's.
        """
        merged = [
            self._columns(module, where) + whole(part) for part, (module, where) in zip(parts, places, strict=True)
        ]
        tiny = np.finfo(np.float32).tiny
        by_input = magnitude.shape[1] > 1 or len(magnitude) == 1
        if by_input:  # [1, in]: a norm over all outputs of the layer, packed ones together
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
    """A layer's rows from `first` on, as a place stores them."""
    rows = slice(first, first + where.columns)
    if isinstance(layer, LoraLayer):
        return layer.down, np.ascontiguousarray(half_split(layer.up[rows], where.head_dim).T)
    return lambda: np.ascontiguousarray(half_split(layer.delta()[rows], where.head_dim).T)


def _same(one: Part, other: Part) -> bool:
    """Whether two writings of an update mean the same."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return same_product(one, other, _SAME)
    first, second = whole(one), whole(other)
    return bool(np.linalg.norm(first - second) <= _SAME * np.linalg.norm(first))


def combine(loras: Iterable[tuple[PlacedLora, float]], module: str) -> list[Change]:
    """What several LoRAs add to a module's weights together: their ranks side by side, the weights in `up`.

    Where one of them is no product of thin matrices, their sum is made whole.
    """
    parts: dict[tuple[str, int], list[tuple[Part, float]]] = {}
    for lora, weight in loras:
        for key, part in lora.modules.get(module, {}).items():
            parts.setdefault(key, []).append((part, weight))
    return [_sum(tensor, first, found) for (tensor, first), found in parts.items()]


def _sum(tensor: str, first: int, found: Sequence[tuple[Part, float]]) -> Change:
    thin = [(part[0], part[1] * np.float32(weight)) for part, weight in found if isinstance(part, tuple)]
    if len(thin) == len(found):
        return LowRank(
            tensor, first, np.concatenate([down for down, _ in thin]), np.concatenate([up for _, up in thin])
        )

    def make() -> np.ndarray:
        # Not sum(), which begins with a 0.
        total = whole(found[0][0]) * np.float32(found[0][1])
        for part, weight in found[1:]:
            total += whole(part) * np.float32(weight)
        return total

    return Dense(tensor, first, make)


@dataclasses.dataclass(frozen=True)
class ActiveLora:
    """A LoRA that changes images now.

    Attributes:
        name, weight: as `Engine.load_lora` and `Engine.set_loras` know them.
        path: the file, or PEFT's folder.
        sha256: hex, of the bytes that were loaded; the file may hold others by now.
        settings_sha256: hex, of PEFT's adapter_config.json beside them; empty if there was none.
        strict: whether all of it fits; False if a part was left out.
    """

    name: str
    weight: float
    path: Path
    sha256: str
    settings_sha256: str = ""
    strict: bool = True

    def to_json(self) -> dict[str, Any]:
        """As images are recorded with it."""
        return {**vars(self), "path": str(self.path)}


class LoraSet:
    """The LoRAs that an engine has loaded, and their weights. Changes wait for running requests, and hold new ones.

    Args:
        manifest, pipeline: the engine's.
        weights_lock: every request reads under it.
        changed: called with the modules that have new weights, before any request runs on them.
        bundle: the bundle's folder; without, DoRA, whole weights, biases and norms are refused.
    """

    def __init__(
        self,
        manifest: Manifest,
        pipeline: Pipeline,
        weights_lock: FairRWLock,
        changed: Callable[[Collection[str]], None],
        bundle: Path | None = None,
    ) -> None:
        self._bundle = bundle
        self._manifest, self._pipeline, self._weights_lock, self._changed = manifest, pipeline, weights_lock, changed
        self._loaded: dict[str, tuple[PlacedLora, float]] = {}
        self._paths: dict[str, Path] = {}

    @property
    def weights(self) -> dict[str, float]:
        """Every loaded LoRA's weight; 0 is off."""
        return {name: weight for name, (_, weight) in self._loaded.items()}

    @property
    def active(self) -> list[ActiveLora]:
        """Those that change images now, in the order in which they are summed."""
        return [
            ActiveLora(name, weight, self._paths[name], lora.sha256, lora.settings_sha256, not lora.left_out)
            for name, (lora, weight) in self._loaded.items()
            if weight != 0
        ]

    def load(self, path: Path, weight: float, name: str | None, strict: bool = True) -> str:
        """See `Engine.load_lora`."""
        name = name or (path.name if is_folder(path) else path.stem)
        weight = _checked(name, weight)
        try:
            lora = place(read_lora(path), self._manifest, self._bundle, strict=strict)
        except OutOfMemory:
            raise
        except MemoryError as error:
            raise OutOfMemory(f"{path}: too little memory to read it; nothing was changed: free memory") from error
        with self._weights_lock.write("load_lora"):
            if name in self._loaded:
                raise RequestError(
                    f"a LoRA named {name!r} is loaded already; unload_lora({name!r}) first, or give another name"
                )
            self._apply({**self._loaded, name: (lora, weight)})
            self._paths[name] = path
        for note in lora.notes:
            # At whoever called `Engine.load_lora`.
            warnings.warn(LoraWarning(f"{path}: {note}", lora.left_out), stacklevel=3)
        return name

    def set(self, weights: Mapping[str, float]) -> None:
        """See `Engine.set_loras`."""
        checked = {name: _checked(name, weight) for name, weight in weights.items()}
        with self._weights_lock.write("set_loras"):
            for name in checked:
                self._known(name)
            self._apply({name: (lora, checked.get(name, 0.0)) for name, (lora, _) in self._loaded.items()})

    def unload(self, name: str) -> None:
        """See `Engine.unload_lora`."""
        with self._weights_lock.write("unload_lora"):
            self._known(name)
            self._apply({other: value for other, value in self._loaded.items() if other != name})

    def _known(self, name: str) -> None:
        if name not in self._loaded:
            raise RequestError(f"no LoRA named {name!r} is loaded; there are: {', '.join(self._loaded) or 'none'}")

    def _apply(self, wanted: dict[str, tuple[PlacedLora, float]]) -> None:
        """Give the modules the weights of `wanted`, or leave everything as it is and raise."""
        modules = [module for module in LORA_MODULES if _on(wanted, module) != _on(self._loaded, module)]
        try:
            self._pipeline.patch({module: combine(_on(wanted, module), module) for module in modules})
        except BaseException:
            self._pipeline.patch({module: combine(_on(self._loaded, module), module) for module in modules})
            raise
        self._loaded = wanted
        self._changed(modules)


def _on(loaded: Mapping[str, tuple[PlacedLora, float]], module: str) -> list[tuple[PlacedLora, float]]:
    """The LoRAs that change a module now."""
    return [(lora, weight) for lora, weight in loaded.values() if weight != 0 and lora.modules.get(module)]


def _checked(name: str, weight: float) -> float:
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
        raise RequestError(f"LoRA {name!r}: expected a finite weight such as 0.8, got {weight!r}")
    return float(weight)
