"""LoRAs on a live engine: where a file's layers lie in a bundle, several at once with weights, taken off again.

The modules' weights are always the bundle's plus the sum of the LoRAs that are on, made anew from the bundle's file at
every change: nothing is subtracted, so what is left when all are off is the bundle's own bytes.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .backends.base import LowRank, Pipeline
from .errors import LoraError, RequestError
from .lora_file import LoraFile, LoraLayer, read_lora
from .manifest import LinearPlace, Manifest
from .turns import Turns

# The modules that a LoRA may change. No two of them have a layer of the same name.
MODULES = ("text_encoder", "context_refiner", "transformer")

# What tools write before a layer's name: each may be there or not, in this order; then it is the checkpoint's.
_PREFIXES = re.compile(
    r"^(base_model\.model\.)?"
    r"(transformer\.|model\.diffusion_model\.|diffusion_model\.|unet\.|text_encoder\."
    r"|text_encoders\.[^.]+\.(transformer\.)?|lora_unet__?|lora_transformer_|lora_te\d?_|lycoris_)?"
    r"(model[._])?"
)

# The checkpoint's names as the original code and ComfyUI have them; export/single_file.py has the way back.
_ALIASES = (
    (".attention.to_out.0", ".attention.out"),
    (".attention.to_out.0", ".attention.to_out"),
    ("all_final_layer.2-1.", "final_layer."),
    ("all_x_embedder.2-1", "x_embedder"),
)


@dataclasses.dataclass(frozen=True, eq=False)
class PlacedLora:
    """A file's layers as the modules hold them: by module, then by (tensor, first column), `down` and `up`.

    `down` is float32 `[rank, in_features]`, `up` float32 `[rank, columns]` in the stored order of the columns.
    `sha256` is that of the file's bytes, as they were read.
    """

    modules: Mapping[str, Mapping[tuple[str, int], tuple[np.ndarray, np.ndarray]]]
    sha256: str = ""


class _Names:
    """A bundle's linear layers under all their names."""

    def __init__(self, manifest: Manifest) -> None:
        self.places: dict[str, tuple[str, LinearPlace]] = {}
        for module in MODULES:
            for name, place in manifest.module(module).linears.items():
                self.places[name] = (module, place)
        if not self.places:
            raise LoraError(
                f"bundle {manifest.name!r} does not say where the checkpoint's layers lie in its weights; "
                "an older zimage-export made it: export it again to use LoRAs"
            )
        # What a file may write → the layers that are meant; a packed qkv is three of them, one after the other.
        self._aliases: dict[str, tuple[str, ...]] = {}
        for name in self.places:
            meant: dict[str, tuple[str, ...]] = {name: (name,)}
            for own, other in _ALIASES:
                if own in name:
                    meant[name.replace(own, other)] = (name,)
            if name.endswith(".attention.to_q"):
                block = name.removesuffix("to_q")
                meant[f"{block}qkv"] = (name, f"{block}to_k", f"{block}to_v")
            for alias, names in meant.items():
                self._aliases[alias] = names
                self._aliases[alias.replace(".", "_")] = names

    def find(self, name: str) -> tuple[str, ...]:
        """The layers that a file's name means; none where the bundle has no such layer."""
        return self._aliases.get(_PREFIXES.sub("", name)) or self._aliases.get(name, ())

    def summary(self) -> str:
        """`layers.0…29.attention.to_q, …`: every layer once, with the numbers there are."""
        numbers: dict[tuple[str, str], list[int]] = {}
        for name in self.places:
            match = re.match(r"(.*?layers|.*?refiner)\.(\d+)\.(.*)", name)
            key, number = ((match[1], match[3]), int(match[2])) if match else ((name, ""), 0)
            numbers.setdefault(key, []).append(number)
        return ", ".join(
            f"{first}.{'…'.join(map(str, dict.fromkeys((min(found), max(found)))))}.{rest}" if rest else first
            for (first, rest), found in numbers.items()
        )


def place(file: LoraFile, manifest: Manifest) -> PlacedLora:
    """Find each layer's place. Raises LoraError with every key that has none, and what was expected of it."""
    names = _Names(manifest)
    modules: dict[str, dict[tuple[str, int], tuple[np.ndarray, np.ndarray]]] = {}
    problems, bad = list(file.problems), list(file.bad_keys)
    lost = False
    for layer in file.layers:
        problem, found = None, names.find(layer.name)
        lost = lost or not found
        if not found:
            problem = "no such layer in this bundle"
        else:
            problem = _put(layer, [names.places[name] for name in found], modules)
        if problem is not None:
            problems.append(f"{', '.join(layer.keys)}: {problem}")
            bad += layer.keys
    if problems:
        if lost:
            problems.append(f"the bundle's layers: {names.summary()}")
        raise LoraError(
            f"{file.path}: no LoRA for bundle {manifest.name!r}; nothing of it was used:\n  " + "\n  ".join(problems),
            bad,
        )
    return PlacedLora(modules, file.sha256)


def _put(
    layer: LoraLayer,
    places: list[tuple[str, LinearPlace]],
    modules: dict[str, dict[tuple[str, int], tuple[np.ndarray, np.ndarray]]],
) -> str | None:
    """Add a layer to `modules`; returns what is wrong with it instead."""
    wanted = sum(where.columns for _, where in places)
    inputs = places[0][1].in_features
    if layer.down.shape[1] != inputs or layer.up.shape[0] != wanted:
        got = f"{list(layer.down.shape)} and {list(layer.up.shape)}"
        return f"expected [rank, {inputs}] and [{wanted}, rank], got {got}: it is of a model of another size"
    rows = 0
    for module, where in places:
        up = _half_split(layer.up[rows : rows + where.columns], where.head_dim)
        rows += where.columns
        key = (where.tensor, where.first_column)
        if key in modules.setdefault(module, {}):
            return "expected each layer once, got it a second time under another name"
        modules[module][key] = (layer.down, np.ascontiguousarray(up.T))
    return None


def _half_split(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """The checkpoint's order of rows to the stored one; see `LinearPlace.head_dim`."""
    if head_dim == 0:
        return rows
    return rows.reshape(-1, head_dim // 2, 2, rows.shape[1]).transpose(0, 2, 1, 3).reshape(rows.shape)


def combine(loras: Iterable[tuple[PlacedLora, float]], module: str) -> list[LowRank]:
    """What several LoRAs add to a module's weights together: their ranks side by side, the weights in `up`."""
    parts: dict[tuple[str, int], list[tuple[np.ndarray, np.ndarray]]] = {}
    for lora, weight in loras:
        for key, (down, up) in lora.modules.get(module, {}).items():
            parts.setdefault(key, []).append((down, up * np.float32(weight)))
    return [
        LowRank(tensor, first, np.concatenate([down for down, _ in found]), np.concatenate([up for _, up in found]))
        for (tensor, first), found in parts.items()
    ]


@dataclasses.dataclass(frozen=True)
class ActiveLora:
    """A LoRA that changes images now.

    Attributes:
        name, weight: as `Engine.load_lora` and `Engine.set_loras` know them.
        path: the file, or PEFT's folder.
        sha256: hex, of the bytes that were loaded; the file may hold others by now.
    """

    name: str
    weight: float
    path: Path
    sha256: str

    def to_json(self) -> dict[str, Any]:
        """As images are recorded with it."""
        return {**vars(self), "path": str(self.path)}


class LoraSet:
    """The LoRAs that an engine has loaded, and their weights. Changes wait for running requests, and hold new ones.

    Args:
        manifest, pipeline: the engine's.
        turns: every request runs in `turns.together()`.
        changed: called with the modules that have new weights, before any request runs on them.
    """

    def __init__(
        self, manifest: Manifest, pipeline: Pipeline, turns: Turns, changed: Callable[[Collection[str]], None]
    ) -> None:
        self._manifest, self._pipeline, self._turns, self._changed = manifest, pipeline, turns, changed
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
            ActiveLora(name, weight, self._paths[name], lora.sha256)
            for name, (lora, weight) in self._loaded.items()
            if weight != 0
        ]

    def load(self, path: Path, weight: float, name: str | None) -> str:
        """See `Engine.load_lora`."""
        name = name or (path.name if path.is_dir() else path.stem)
        weight = _checked(name, weight)
        lora = place(read_lora(path), self._manifest)
        with self._turns.alone("load_lora"):
            if name in self._loaded:
                raise RequestError(
                    f"a LoRA named {name!r} is loaded already; unload_lora({name!r}) first, or give another name"
                )
            self._apply({**self._loaded, name: (lora, weight)})
            self._paths[name] = path
        return name

    def set(self, weights: Mapping[str, float]) -> None:
        """See `Engine.set_loras`."""
        checked = {name: _checked(name, weight) for name, weight in weights.items()}
        with self._turns.alone("set_loras"):
            for name in checked:
                self._known(name)
            self._apply({name: (lora, checked.get(name, 0.0)) for name, (lora, _) in self._loaded.items()})

    def unload(self, name: str) -> None:
        """See `Engine.unload_lora`."""
        with self._turns.alone("unload_lora"):
            self._known(name)
            self._apply({other: value for other, value in self._loaded.items() if other != name})

    def _known(self, name: str) -> None:
        if name not in self._loaded:
            raise RequestError(f"no LoRA named {name!r} is loaded; there are: {', '.join(self._loaded) or 'none'}")

    def _apply(self, wanted: dict[str, tuple[PlacedLora, float]]) -> None:
        """Give the modules the weights of `wanted`, or leave everything as it is and raise."""
        modules = [module for module in MODULES if _on(wanted, module) != _on(self._loaded, module)]
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
