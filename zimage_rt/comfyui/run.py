"""One run of a workflow: its engines, its files, and what its nodes show."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from ..engine import Engine
from ..errors import Cancelled
from ..request.types import StepInfo
from .inputs import InputError
from .values import Model


class Files(Protocol):
    """The files that a workflow may name."""

    def bundle(self, folder: str, name: str) -> str:
        """The bundle that a model's file stands for. Raises InputError if there is none."""

    def lora(self, name: str) -> Path:
        """A LoRA's file. Raises InputError."""

    def image(self, name: str) -> bytes:
        """The content of an input image's file. Raises InputError."""

    def upscaler(self, name: str) -> Path:
        """The file of an upscale model. Raises InputError."""


# The bundle with the model of one bundle and a part (`text_encoder`, `controlnet`) of another, given the part and both
# bundles. Raises InputError if there is none.
Together = Callable[[str, str, str], str]


def only_one(part: str, model: str, other: str) -> str:
    """See `Together`: bundles that share no parts."""
    if model != other:
        raise InputError(
            "value_not_in_list", f"model and {part}: expected those of one bundle, got {model} and {other}"
        )
    return model


@dataclasses.dataclass(frozen=True, eq=False)
class Made:
    """An image that an output node was given.

    Attributes:
        node: the node's id.
        pixels: uint8 `[height, width, 3]`.
        prefix: of its file's name.
        is_preview: whether the node only shows it.
        group: ComfyUI's name of the list that it belongs to in what the node shows.
    """

    node: str
    pixels: np.ndarray
    prefix: str
    is_preview: bool
    group: str = "images"


@dataclasses.dataclass(frozen=True)
class Said:
    """A text that an output node shows."""

    node: str
    text: str
    group: str = "text"


class Events:
    """What is told of a run as it goes on; here nothing."""

    def cached(self, nodes: Sequence[str]) -> None:
        """The nodes whose results of an earlier run are taken."""

    def begins(self, node: str) -> None:
        """A node begins."""

    def samples(self, node: str, shape: Sequence[int], steps: int) -> None:
        """A sampler begins on latents of a shape. May raise WorkflowError to refuse it."""

    def step(self, node: str, info: StepInfo) -> bool:
        """A sampler's node made a step; False ends the run."""
        return True

    def progress(self, node: str, done: int, count: int) -> bool:
        """A node that is no sampler did a part of its work; False ends the run."""
        return True

    def executed(self, node: str, signature: str, shown: Sequence[Made | Said], *, is_cached: bool) -> None:
        """An output node ended; `shown` is empty if it was not run, because what it shows is there already."""


class Run:
    """One run of a workflow.

    Args:
        engine: gives the engine of a bundle by its name.
        files: what may be named.
        events: is told of the run.
        together: finds the bundle of parts of two.

    Attributes:
        node: the id of the node that runs.
        shown: images and texts of output nodes, in the order of their nodes.
    """

    def __init__(
        self,
        engine: Callable[[str], Engine],
        files: Files,
        events: Events | None = None,
        together: Together = only_one,
    ) -> None:
        self._engine, self.files, self.events, self.together = engine, files, events or Events(), together
        self.node = ""
        self.shown: list[Made | Said] = []

    def begin(self, node: str) -> None:
        """Say that a node begins."""
        self.node = node
        self.events.begins(node)

    @property
    def made(self) -> list[Made]:
        """The images of output nodes."""
        return [each for each in self.shown if isinstance(each, Made)]

    def shown_by(self, node: str) -> list[Made | Said]:
        """What an output node shows."""
        return [each for each in self.shown if each.node == node]

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

    def tell(self, done: int, count: int) -> None:
        """Say how much of its work the node has done. Raises Cancelled."""
        if not self.events.progress(self.node, done, count):
            raise Cancelled("the run was cancelled; no image was made")

    def on_step(self, info: StepInfo) -> bool:
        """The callback of a sampler's loop."""
        return self.events.step(self.node, info)
