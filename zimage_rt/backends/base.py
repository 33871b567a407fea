"""What a backend is to the engine: something that loads a module and runs it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from ..manifest import Manifest


class Module(Protocol):
    """One loaded module. Safe to call from several threads."""

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run on arrays by name, as the manifest's TensorSpecs have them; returns the outputs by name."""
        ...


class Backend(Protocol):
    """One way to run modules. `name` is what people write; constructing it loads its library."""

    name: str

    def load_module(self, bundle: Path, manifest: Manifest, module: str) -> Module:
        """Load a module of a bundle whose files were checked. Raises BundleMismatch or OutOfMemory."""
        ...
