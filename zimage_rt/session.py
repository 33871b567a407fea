"""Sessions of several turns, in the sense of a conversation: generate, edit, refine, undo."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from . import checks, limits
from .engine import Engine
from .errors import RequestError
from .request.codec import make_request
from .request.types import Callback, GenerateRequest
from .result import GenerateResult

# The tasks of a turn, each with the engines' roles that can do it, in order of preference.
TASKS: dict[str, tuple[str, ...]] = {
    "generate": ("draft", "final", "edit"),
    "edit": ("edit", "draft", "final"),
    "refine": ("final", "draft", "edit"),
}
ROLES = ("draft", "final", "edit")
# The strength of a turn that says none.
EDIT_STRENGTH, REFINE_STRENGTH = 1.0, 0.3


@dataclasses.dataclass(frozen=True)
class Turn:
    """One turn of a session.

    Attributes:
        task: `generate`, `edit` or `refine`.
        engine: the role of the engine that ran it.
        request: the engine's request.
        result: its result; a refinement begins from `result.latents`.
    """

    task: str
    engine: str
    request: GenerateRequest
    result: GenerateResult


class Session:
    """An image that is edited over several turns. Not thread-safe, though its engines are.

    Nothing is computed twice: the engine caches contexts, and a refinement begins from latents without decoding and
    encoding. A turn without a seed uses the image's own.

    Args:
        engines: one engine for all tasks, or one per role: `draft` (Turbo, for speed), `final` (Base, for the last
            pass) and `edit` (Edit). A task without an engine of its role uses the next role of `TASKS`.
    """

    def __init__(self, engines: Engine | Mapping[str, Engine]) -> None:
        self._engines = {"draft": engines} if isinstance(engines, Engine) else checks.named(engines, "engines")
        for role, engine in self._engines.items():
            if not isinstance(engine, Engine):
                raise RequestError(f"engines: {role}: expected an Engine, got {checks.shown(engine)}")
        unknown = sorted(set(self._engines) - set(ROLES))
        if unknown or not self._engines:
            raise RequestError(f"engines: expected any of {', '.join(ROLES)}, got {', '.join(unknown) or 'none'}")
        self._turns: list[Turn] = []
        self._undone: list[Turn] = []

    @property
    def turns(self) -> tuple[Turn, ...]:
        """All turns that were not undone, the oldest first."""
        return tuple(self._turns)

    @property
    def current(self) -> Turn:
        """The last turn that was not undone. Raises RequestError before the first."""
        if not self._turns:
            raise RequestError("the session has no image yet; call generate first")
        return self._turns[-1]

    def generate(self, prompt: str, *, callback: Callback | None = None, **fields: Any) -> GenerateResult:
        """Generate a new image; fields as in `Engine.generate`, one image per turn."""
        return self._run_turn("generate", {"prompt": prompt, **fields}, callback)

    def edit(
        self,
        prompt: str,
        *,
        mask: Any = None,
        strength: float = EDIT_STRENGTH,
        callback: Callback | None = None,
        **fields: Any,
    ) -> GenerateResult:
        """Change the current image by another prompt: the white part of `mask`, or all of it.

        With a mask and `strength` 1 the white part begins from noise alone; the black part keeps its bytes. Without a
        mask a lower strength preserves something of the image: at most 1 - 1/N with N steps.
        """
        now = self.current
        fields = {"seed": now.result.seeds[0], **fields, **_strength(strength, EDIT_STRENGTH, fields)}
        begin: dict[str, Any] = {"image": now.result.images[0], "mask": mask}
        if mask is None and self._pick("edit")[0] == now.engine:
            begin = {"image_latents": now.result.latents}
        return self._run_turn("edit", {"prompt": prompt, **begin, **fields}, callback)

    def refine(
        self,
        strength: float = REFINE_STRENGTH,
        *,
        scale: float = 1.0,
        callback: Callback | None = None,
        **fields: Any,
    ) -> GenerateResult:
        """Run the end of the schedule on the current image with its own prompt, for detail or a larger `scale`."""
        now = self.current
        request = now.request
        scale = checks.number(scale, "scale", limits.MAX_UPSCALE)
        kept = {"prompt": request.prompt, "negative_prompt": request.negative_prompt, "seed": now.result.seeds[0]}
        if scale != 1.0:
            height, width = now.result.images.shape[1:3]
            size = self._pick("refine")[1].manifest.pipeline.size_multiple
            fields = {"height": _scaled(height, scale, size), "width": _scaled(width, scale, size), **fields}
            fields["fit"] = "stretch"
        same = scale == 1.0 and self._pick("refine")[0] == now.engine and now.request.mask is None
        begin = {"image_latents": now.result.latents} if same else {"image": now.result.images[0]}
        return self._run_turn(
            "refine", {**kept, **begin, **fields, **_strength(strength, REFINE_STRENGTH, fields)}, callback
        )

    def undo(self) -> GenerateResult | None:
        """Undo the last turn; returns the result before it, None if there is none."""
        self._undone.append(self.current)
        self._turns.pop()
        return self._turns[-1].result if self._turns else None

    def redo(self) -> GenerateResult:
        """Redo the turn that was undone last. Raises RequestError if there is none."""
        if not self._undone:
            raise RequestError("nothing to redo: no turn was taken back since the last one")
        self._turns.append(self._undone.pop())
        return self._turns[-1].result

    def _pick(self, task: str) -> tuple[str, Engine]:
        role = next(role for role in TASKS[task] if role in self._engines)
        return role, self._engines[role]

    def _run_turn(self, task: str, fields: dict[str, Any], callback: Callback | None) -> GenerateResult:
        prompt, count = fields["prompt"], fields.get("num_images", 1)
        if not isinstance(prompt, str):
            raise RequestError(f"prompt: expected a string, for the one image of a turn, got {checks.shown(prompt)}")
        if not isinstance(count, int) or count != 1:
            raise RequestError(
                f"num_images: expected 1, as a session draws one image per turn, got {checks.shown(count)}; use "
                "Engine.generate for several"
            )
        role, engine = self._pick(task)
        request = make_request(**fields)
        result = engine.run(request, callback=callback)
        self._turns.append(Turn(task, role, request, result))
        self._undone.clear()
        return result


def _strength(strength: float, default: float, fields: Mapping[str, Any]) -> dict[str, float]:
    """The field of a turn's strength; none if it is the default and a denoise goes before it."""
    return {} if fields.get("denoise") is not None and strength == default else {"strength": strength}


def _scaled(size: int, scale: float, multiple: int) -> int:
    return max(multiple, int(np.rint(size * scale / multiple)) * multiple)
