"""The sigmas of a request: the whole schedule, or its end if the request begins from an image."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from ..checks import choice, integer, items, number
from ..errors import RequestError
from ..limits import MAX_STEPS
from ..sampling.samplers import SAMPLERS
from ..sampling.schedules import SCHEDULES, custom_sigmas, denoise_sigmas, first_step, schedule_sigmas

_SIGMAS = "numbers that fall, from at most 1 to more than 0; the last 0 is added"


@dataclasses.dataclass(frozen=True)
class ScheduleFields:
    """The unchecked fields of a request, or of its second pass, that determine its sigmas."""

    schedule: Any
    sampler: Any
    sigmas: Any
    num_inference_steps: Any
    strength: Any
    denoise: Any


def resolve_sigmas(
    fields: ScheduleFields, *, default_steps: int, shift: float, begins: bool, prefix: str = ""
) -> np.ndarray:
    """The sigmas for the sampler, float32 `[steps + 1]`.

    Args:
        fields: the request's fields.
        default_steps: the number of steps if the request has none.
        shift: the timestep shift.
        begins: whether the request begins from an image, so that strength and denoise apply.
        prefix: the prefix of field names in messages: `second_pass.` for the second pass.

    Raises:
        RequestError: a field is invalid.
    """
    name = choice(fields.schedule, "schedule", SCHEDULES)
    spare = SAMPLERS[choice(fields.sampler, "sampler", SAMPLERS)].spare_step
    part = _check_denoise(fields.denoise, begins, prefix)
    sigmas, num_inference_steps = fields.sigmas, fields.num_inference_steps
    if sigmas is None:
        steps = default_steps if num_inference_steps is None else num_inference_steps
        steps = integer(steps, f"{prefix}num_inference_steps", 1, MAX_STEPS)
        if part is not None:
            if steps / part > MAX_STEPS:
                raise RequestError(
                    f"{prefix}denoise: expected at least {steps / MAX_STEPS:g} with {steps} steps, so that the "
                    f"schedule has at most {MAX_STEPS}, got {part:g}"
                )
            return denoise_sigmas(name, steps, shift, part, spare_step=spare)
        whole = schedule_sigmas(name, steps, shift, spare_step=spare)
    else:
        if part is not None and part < 1:
            raise RequestError(
                f"{prefix}denoise: expected none beside `sigmas`, which are run whole; give those to run"
            )
        whole = custom_sigmas(_check_sigmas(sigmas), shift)
        count = len(whole) - 1
        if num_inference_steps is not None and integer(num_inference_steps, "num_inference_steps", 1, 1 << 62) != count:
            raise RequestError(
                f"num_inference_steps: expected {count}, as many as there are sigmas, or none, "
                f"got {num_inference_steps}"
            )
    if not begins or part is not None:
        return whole
    share = number(fields.strength, f"{prefix}strength", 1.0)
    if share == 0:
        raise RequestError(f"{prefix}strength: expected more than 0, which would change nothing, and at most 1")
    # At least one step, even if the strength rounds to none.
    return whole[min(first_step(len(whole) - 1, share), len(whole) - 2) :]


def _check_sigmas(sigmas: Any) -> np.ndarray:
    """The sigmas that a request gives itself, checked, float64 `[steps]`."""
    values = np.array([number(item, "sigmas", np.inf, -np.inf) for item in items(sigmas, "sigmas", _SIGMAS, MAX_STEPS)])
    # Compared in float32, as the loop has them: two that round to one number would be a step of length 0.
    falling = len(values) > 0 and bool((np.diff(values.astype(np.float32)) < 0).all())
    if not falling or not (np.float32(values[-1]) > 0 and values[0] <= 1):
        raise RequestError(f"sigmas: expected {_SIGMAS}")
    return values


def _check_denoise(value: Any, begins: bool, prefix: str) -> float | None:
    if value is None:
        return None
    denoise = number(value, f"{prefix}denoise", 1.0)
    if denoise == 0:
        raise RequestError(f"{prefix}denoise: expected more than 0, which would change nothing, and at most 1")
    if denoise < 1 and not begins:
        raise RequestError("denoise: expected an image to begin with; give `image` or `image_latents`, or denoise 1")
    return denoise
