"""The LoRAs of a loaded engine: loading, unloading, and their weights per engine or per request.

The modules' weights are the bundle's plus the sum of the active LoRAs. Every change recomputes them from the bundle's
file; nothing is subtracted, so that without LoRAs they are the bundle's own bytes.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..backends.base import Change, Dense, LowRank, Pipeline
from ..bundle.manifest import Manifest
from ..bundle.modules import LORA_MODULES
from ..errors import EngineClosed, LoraWarning, OutOfMemory, RequestError
from ..rwlock import FairRWLock
from .file import is_folder, read_lora
from .match import MatchedLora, Part, match_layers, whole

log = logging.getLogger(__name__)


def combine(loras: Iterable[tuple[MatchedLora, float]], module: str) -> list[Change]:
    """The changes of a module's tensors by several LoRAs: concatenated ranks, with the LoRAs' weights in `up`.

    If the change of one of them is a full matrix, their sum is one too.
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
        # Not sum(), which would begin with an integer 0.
        total = whole(found[0][0]) * np.float32(found[0][1])
        for part, weight in found[1:]:
            total += whole(part) * np.float32(weight)
        return total

    return Dense(tensor, first, make)


@dataclasses.dataclass(frozen=True)
class ActiveLora:
    """An active LoRA, whose weight is not 0.

    Attributes:
        name, weight: as in `Engine.load_lora` and `Engine.set_loras`.
        path: the file, or PEFT's folder.
        sha256: hex, of the bytes that were loaded; the file may have changed since.
        settings_sha256: hex, of PEFT's adapter_config.json beside them; empty if there was none.
        strict: whether all of its layers fit; False if some were left out.
    """

    name: str
    weight: float
    path: Path
    sha256: str
    settings_sha256: str = ""
    strict: bool = True

    def to_json(self) -> dict[str, Any]:
        """The LoRA as JSON for an image's record."""
        return {**vars(self), "path": str(self.path)}


class LoraSet:
    """The loaded LoRAs of an engine, with the engine's weights for them and those of the running requests.

    Args:
        manifest, pipeline: the engine's.
        weights_lock: held by requests as readers, with their LoRAs' weights as the state.
        changed: called with the patched modules, before any request runs on them.
        bundle: the bundle's folder; without it DoRA, full weights, biases and norms are refused.
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
        self._loaded: dict[str, MatchedLora] = {}
        self._paths: dict[str, Path] = {}
        self._weights: dict[str, float] = {}  # the engine's
        self._applied: dict[str, float] = {}  # the weights in the modules, without zeros
        self._applying = threading.Lock()
        self._closed = False

    @property
    def weights(self) -> dict[str, float]:
        """The engine's weight of every loaded LoRA; 0 means inactive."""
        return dict(self._weights)

    @property
    def active(self) -> list[ActiveLora]:
        """The engine's active LoRAs, in the order of their sum."""
        return self._active(self._weights)

    def _active(self, weights: Mapping[str, float]) -> list[ActiveLora]:
        return [
            ActiveLora(name, weights[name], self._paths[name], lora.sha256, lora.settings_sha256, not lora.left_out)
            for name, lora in self._loaded.items()
            if weights.get(name, 0.0) != 0
        ]

    @contextmanager
    def use(self, weights: Mapping[str, float] | None = None) -> Iterator[list[ActiveLora]]:
        """Hold the weights lock with these LoRAs applied, or the engine's; requests with other weights wait.

        Yields the active LoRAs. A thread that holds the lock already continues with the LoRAs that it has.

        Raises:
            RequestError: a name is not loaded.
        """
        state = None if weights is None else frozenset((name, weight) for name, weight in weights.items() if weight)
        with self._weights_lock.read(state) as entered:
            with self._applying:
                if entered:
                    for name in weights or ():
                        self._known(name, "loras")
                    self._apply(self._loaded, self._weights if weights is None else weights)
                active = self._active(self._applied)
            yield active

    def load(self, path: Path, weight: float, name: str | None, strict: bool = True) -> str:
        """See `Engine.load_lora`."""
        name = name or (path.name if is_folder(path) else path.stem)
        try:
            lora = match_layers(read_lora(path), self._manifest, self._bundle, strict=strict)
        except OutOfMemory:
            raise
        except MemoryError as error:
            raise OutOfMemory(f"{path}: too little memory to read it; nothing was changed: free memory") from error
        with self._weights_lock.write("load_lora"):
            if name in self._loaded:
                raise RequestError(
                    f"a LoRA named {name!r} is loaded already; unload_lora({name!r}) first, or give another name",
                    field="name",
                )
            self._apply({**self._loaded, name: lora}, {**self._weights, name: weight})
            self._weights[name] = weight
            self._paths[name] = path
        log.info("LoRA %r loaded from %s, weight %g", name, path, weight)
        for note in lora.notes:
            # At the caller of `Engine.load_lora`.
            warnings.warn(LoraWarning(f"{path}: {note}", lora.left_out), stacklevel=3)
        return name

    def set(self, weights: Mapping[str, float]) -> None:
        """See `Engine.set_loras`."""
        with self._weights_lock.write("set_loras"):
            for name in weights:
                self._known(name, "weights")
            wanted = {name: weights.get(name, 0.0) for name in self._loaded}
            self._apply(self._loaded, wanted)
            self._weights = wanted

    def unload(self, name: str) -> None:
        """See `Engine.unload_lora`."""
        with self._weights_lock.write("unload_lora"):
            self._known(name, "name")
            kept = {other: weight for other, weight in self._weights.items() if other != name}
            self._apply({other: lora for other, lora in self._loaded.items() if other != name}, kept)
            self._weights = kept
            del self._paths[name]
        log.info("LoRA %r unloaded", name)

    def close(self) -> None:
        """Drop all LoRAs; loading one is then refused. Called under the weights lock."""
        self._closed = True
        self._loaded, self._weights, self._applied = {}, {}, {}

    def _known(self, name: str, field: str) -> None:
        if name not in self._loaded:
            known = ", ".join(self._loaded) or "none"
            raise RequestError(f"{field}: no LoRA named {name!r} is loaded; there are: {known}")

    def _apply(self, loaded: dict[str, MatchedLora], weights: Mapping[str, float]) -> None:
        """Patch the modules with LoRAs; if that fails, restore the patches before and raise."""
        applied = {name: weights[name] for name in loaded if weights.get(name, 0.0) != 0}
        modules = [
            module
            for module in LORA_MODULES
            if _loras_of(loaded, applied, module) != _loras_of(self._loaded, self._applied, module)
        ]
        if modules:
            if self._closed:
                raise EngineClosed("the engine was closed; load the bundle again")
            try:
                self._pipeline.patch(
                    {module: combine(_loras_of(loaded, applied, module), module) for module in modules}
                )
            except BaseException as error:
                log.warning("patching %s failed (%s): back to the weights before", modules, type(error).__name__)
                before = {module: combine(_loras_of(self._loaded, self._applied, module), module) for module in modules}
                self._pipeline.patch(before)
                raise
        self._loaded, self._applied = loaded, applied
        if modules:
            log.debug("LoRAs that are on now: %s", applied or "none")
            self._changed(modules)


def _loras_of(
    loaded: Mapping[str, MatchedLora], weights: Mapping[str, float], module: str
) -> list[tuple[MatchedLora, float]]:
    """The LoRAs that change a module, with their weights, in the order of `weights`."""
    return [(loaded[name], weight) for name, weight in weights.items() if loaded[name].modules.get(module)]
