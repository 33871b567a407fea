"""One run of a workflow: its engines, its files, and the images that were made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from ..backends.base import OnStep
from ..engine import Engine
from .values import Model


class Files(Protocol):
    """The files that a workflow may name."""

    def bundle(self, folder: str, name: str) -> str:
        """The bundle that a model's file stands for. Raises InputError if there is none."""

    def lora(self, name: str) -> Path:
        """A LoRA's file. Raises InputError."""

    def image(self, name: str) -> Path:
        """An input image's file. Raises InputError."""


@dataclasses.dataclass(frozen=True, eq=False)
class Made:
    """An image that an output node was given.

    Attributes:
        node: the node's id.
        pixels: uint8 `[height, width, 3]`.
        prefix: of its file's name.
        is_preview: whether the node only shows it.
    """

    node: str
    pixels: np.ndarray
    prefix: str
    is_preview: bool


class Run:
    """One run of a workflow.

    Args:
        engine: gives the engine of a bundle by its name.
        files: what may be named.
        on_step: called after each step with the node's id; see `SampleJob`.

    Attributes:
        node: the id of the node that runs.
        made: the images, in the order of their nodes.
    """

    def __init__(
        self,
        engine: Callable[[str], Engine],
        files: Files,
        on_step: Callable[[str, int, int], bool] = lambda node, step, steps: True,
    ) -> None:
        self._engine, self.files, self._on_step = engine, files, on_step
        self.node = ""
        self.made: list[Made] = []

    def engine(self, bundle: str) -> Engine:
        """The engine of a bundle."""
        return self._engine(bundle)

    def model_engine(self, model: Model) -> Engine:
        """The engine of a model, with its LoRAs loaded."""
        engine = self._engine(model.bundle)
        for name in model.loras:
            if name not in engine.loras:
                engine.load_lora(self.files.lora(name), 0.0, name, strict=False)
        return engine

    @property
    def on_step(self) -> OnStep:
        """The callback of a sampler's loop."""
        node = self.node
        return lambda step, steps, *_: self._on_step(node, step + 1, steps)
