"""Messages between the service and its worker processes, pickled over a pipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from .jobs import Image, Output
from .workflow_task import Task


@dataclasses.dataclass(frozen=True)
class Run:
    """Draw a job. Every message about it carries its `attempt`."""

    job: str
    attempt: int
    model: str
    fields: Mapping[str, Any]
    output: Output
    workflow: Task | None = None  # what to run in place of a request


@dataclasses.dataclass(frozen=True)
class Cancel:
    """Stop a job after the step that runs."""

    job: str


@dataclasses.dataclass(frozen=True)
class Stop:
    """End the worker when its jobs have ended."""


@dataclasses.dataclass(frozen=True)
class Ready:
    """The worker has loaded and warmed its models, or says why it could not (`problems` by model)."""

    problems: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Step:
    """A job made a step; `preview` is a JPEG."""

    job: str
    attempt: int
    step: int
    steps: int
    sigma: float
    preview: bytes | None = None


@dataclasses.dataclass(frozen=True)
class Told:
    """A workflow goes on: an event of its job, see `comfyui.runner`."""

    job: str
    attempt: int
    name: str
    data: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A job's images are drawn and are being encoded: the device is free for another job."""

    job: str
    attempt: int


@dataclasses.dataclass(frozen=True)
class Finished:
    """A job ended: with images, or with an error as `{code, message, field}`; see `safety.Decision`."""

    job: str
    attempt: int
    images: Sequence[Image] = ()
    timings: Mapping[str, float] = dataclasses.field(default_factory=dict)
    seeds: Sequence[int] = ()
    warnings: Sequence[str] = ()
    safety: Mapping[str, Any] | None = None
    error: Mapping[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Loaded:
    """The engines that the worker has now, and what they use.

    Attributes:
        models: names.
        memory: bytes of the device's memory by use, if the backend knows.
        caches: how often something was there (`hit`) or not (`miss`), by cache and then by that.
    """

    models: Sequence[str]
    memory: Mapping[str, int] = dataclasses.field(default_factory=dict)
    caches: Mapping[tuple[str, str], int] = dataclasses.field(default_factory=dict)
