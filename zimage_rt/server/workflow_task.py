"""A workflow on its way to a worker."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ..comfyui.plan import Plan


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What one run may ask for: see `LimitsConfig`."""

    max_pixels: int
    max_steps: int
    max_images: int


@dataclasses.dataclass(frozen=True)
class Task:
    """A checked workflow with all that a worker needs for it, which may be another machine.

    Attributes:
        owner: the key's name; results are taken again only for the same one.
        plan: the workflow.
        models: of the service, by the files that stand for them; see `Plan.files`.
        images: the contents of input images by the names that the workflow has for them.
        texts: the texts of saved PNGs.
        bounds: limits of the run.
        previews: a preview after every so many steps; 0 for none.
    """

    owner: str
    plan: Plan
    models: Mapping[tuple[str, str], str]
    images: Mapping[str, bytes]
    texts: Mapping[str, str]
    bounds: Bounds
    previews: int = 0
