"""Noise schedules as pure functions: the sigmas from 1 to 0.

The checkpoint's or the request's shift maps s to `shift * s / (1 + (shift - 1) * s)`; it is 3.0 for Z-Image-Turbo.

Plain names are ComfyUI's and give its numbers (0.33.0, commit 783545f6); names that begin with `diffusers_` give
diffusers' (FlowMatchEulerDiscreteScheduler as used by ZImagePipeline). `SCHEDULES` is the one list of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from .beta import beta_quantile


def flow_match_sigmas(num_inference_steps: int, shift: float) -> np.ndarray:
    """Sigmas of flow-match Euler from 1 to 0: `linspace(1, 1/N, N)`, shifted, then 0.

    The source is diffusers' FlowMatchEulerDiscreteScheduler as used by ZImagePipeline.

    Args:
        num_inference_steps: N, the number of steps; at least 1.
        shift: timestep shift; positive.

    Returns:
        float32 `[N + 1]`.
    """
    n = num_inference_steps
    if n < 1:
        raise ValueError(f"num_inference_steps: expected at least 1, got {n}")
    if not shift > 0:
        raise ValueError(f"shift: expected a positive number, got {shift}")
    return custom_sigmas((n - np.arange(n, dtype=np.float64)) / n, shift)


def custom_sigmas(sigmas: Sequence[float] | np.ndarray, shift: float) -> np.ndarray:
    """The schedule of given sigmas, which are before the shift and without the last 0, as diffusers' `sigmas`."""
    values = np.asarray(sigmas, np.float64).astype(np.float32)
    # In float32, as in diffusers, so that the sigmas equal its own to about the last place.
    shifted = np.float32(shift) * values / (np.float32(1) + np.float32(shift - 1) * values)
    return np.append(shifted, np.float32(0))


def _respace(sigmas: np.ndarray, spread: Callable[[float, float, int], np.ndarray]) -> np.ndarray:
    """The schedule with the sigmas between the first and the last above 0 replaced by those of `spread`."""
    if len(sigmas) < 3:
        return sigmas
    values = spread(float(sigmas[-2]), float(sigmas[0]), len(sigmas) - 1)
    return np.append(values, 0.0).astype(np.float32)


def _karras(low: float, high: float, count: int) -> np.ndarray:
    rho = 7.0  # Karras et al. 2022, equation 5
    ramp = np.linspace(0, 1, count)
    return (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho


def _exponential(low: float, high: float, count: int) -> np.ndarray:
    return np.exp(np.linspace(math.log(high), math.log(low), count))


def _beta(low: float, high: float, count: int) -> np.ndarray:
    # "Beta Sampling is All You Need", Lee et al. 2024: alpha = beta = 0.6.
    return low + np.array([beta_quantile(p, 0.6) for p in np.linspace(1, 0, count)]) * (high - low)


def _table(shift: float) -> np.ndarray:
    """ComfyUI's table of 1000 sigmas, rising, float32, in which its schedulers look up sigmas or their ends."""
    return custom_sigmas(np.arange(1, 1001) / 1000, shift)[:-1]


def _append_zero(sigmas: Sequence[float] | np.ndarray) -> np.ndarray:
    return np.append(np.asarray(sigmas, np.float64), 0.0).astype(np.float32)


def _comfyui_simple(num_inference_steps: int, shift: float) -> np.ndarray:
    table = _table(shift)
    return _append_zero([table[999 - int(i * 1000 / num_inference_steps)] for i in range(num_inference_steps)])


def _linspace(first: float, last: float, count: int) -> np.ndarray:
    """Even steps as in torch.linspace: counted from the nearer end, in float32, with one rounding.

    Equal to the bit, because sigmas that differ in the sixth decimal get other noise of a Brownian path.
    """
    start, end = np.float32(first), np.float32(last)
    if count == 1:
        return np.array([start])
    step = float((end - start) / np.float32(count - 1))
    i = np.arange(count)
    return np.where(i < count // 2, float(start) + step * i, float(end) - step * (count - 1 - i)).astype(np.float32)


def _comfyui_normal(num_inference_steps: int, shift: float) -> np.ndarray:
    """Even steps down to the smallest sigma of the table, then shifted; that sigma is shifted twice, as in ComfyUI."""
    return custom_sigmas(_linspace(1.0, float(_table(shift)[0]), num_inference_steps), shift)


def _former_normal(num_inference_steps: int, shift: float) -> np.ndarray:
    """`normal` as in 0.1: computed in float64."""
    smallest = shift * 1e-3 / (1 + (shift - 1) * 1e-3)
    return custom_sigmas(np.linspace(1.0, smallest, num_inference_steps), shift)


def _comfyui_sgm_uniform(num_inference_steps: int, shift: float) -> np.ndarray:
    return custom_sigmas(_linspace(1.0, float(_table(shift)[0]), num_inference_steps + 1)[:-1], shift)


def _comfyui_karras(num_inference_steps: int, shift: float) -> np.ndarray:
    low, high = (float(end) ** (1 / 7) for end in _table(shift)[[0, -1]])
    roots = np.float32(high) + _linspace(0.0, 1.0, num_inference_steps) * np.float32(low - high)
    return _append_zero(roots.astype(np.float64) ** 7)


def _comfyui_exponential(num_inference_steps: int, shift: float) -> np.ndarray:
    low, high = (math.log(float(end)) for end in _table(shift)[[0, -1]])
    return _append_zero(np.exp(_linspace(high, low, num_inference_steps).astype(np.float64)))


def _comfyui_ddim_uniform(num_inference_steps: int, shift: float) -> np.ndarray:
    return _append_zero(_table(shift)[1 :: max(1000 // num_inference_steps, 1)][::-1])


def _comfyui_beta(num_inference_steps: int, shift: float) -> np.ndarray:
    table = _table(shift)
    shares = 1 - np.arange(num_inference_steps) / num_inference_steps
    indices = np.rint([beta_quantile(float(share), 0.6) * 999 for share in shares]).astype(int)
    return _append_zero(table[[index for i, index in enumerate(indices) if i == 0 or index != indices[i - 1]]])


def _comfyui_linear_quadratic(num_inference_steps: int, shift: float) -> np.ndarray:
    """Mochi's schedule (Genmo 2024): half of the steps fall evenly to 0.975, the others quadratically."""
    del shift
    n, knee = num_inference_steps, 0.025
    if n == 1:
        return _append_zero([1.0])
    linear = n // 2
    quadratic = n - linear
    bend = (linear - knee * n) / (linear * quadratic**2)
    slope = knee / linear - 2 * (linear - knee * n) / quadratic**2
    way = [i * knee / linear if i < linear else bend * (i * i + linear * linear) + slope * i for i in range(n)]
    return _append_zero(1 - np.array(way))


def _comfyui_kl_optimal(num_inference_steps: int, shift: float) -> np.ndarray:
    """Even angles ("Align Your Steps", Sabour et al. 2024, appendix). ComfyUI's formula fails for one step."""
    low, high = (np.float32(math.atan(float(end))) for end in _table(shift)[[0, -1]])
    way = np.arange(num_inference_steps, dtype=np.float32) / np.float32(max(num_inference_steps - 1, 1))
    angles = way * low + (np.float32(1) - way) * high
    return _append_zero(np.tan(angles.astype(np.float64)))


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A noise schedule.

    Attributes:
        name: its name in requests.
        label: its name in other programs.
        source: the program whose numbers it gives: `ComfyUI`, `diffusers`, or `zimage_rt 0.1`, for old records.
        help: one line of help.
        sigmas: maps `(num_inference_steps, shift)` to the falling sigmas with a last 0, float32 `[steps + 1]`; some
            schedules have a step less or more than requested, as their help says.
    """

    name: str
    label: str
    source: str
    help: str
    sigmas: Callable[[int, float], np.ndarray]


# Every schedule; requests, records, the command line's help and docs/samplers.md use this table.
SCHEDULES: dict[str, Schedule] = {
    schedule.name: schedule
    for schedule in (
        Schedule(
            "diffusers_simple",
            "Simple",
            "diffusers",
            "The default, Z-Image's own: even steps, shifted. Equals `simple` where the steps divide 1000.",
            flow_match_sigmas,
        ),
        Schedule(
            "diffusers_karras",
            "Karras",
            "diffusers",
            "`use_karras_sigmas`: Karras' spacing between the first and the last sigma of diffusers_simple.",
            lambda n, shift: _respace(flow_match_sigmas(n, shift), _karras),
        ),
        Schedule(
            "diffusers_exponential",
            "Exponential",
            "diffusers",
            "`use_exponential_sigmas`: even in the logarithm between the same two.",
            lambda n, shift: _respace(flow_match_sigmas(n, shift), _exponential),
        ),
        Schedule(
            "diffusers_beta",
            "Beta",
            "diffusers",
            "`use_beta_sigmas`: Beta(0.6, 0.6) between the same two.",
            lambda n, shift: _respace(flow_match_sigmas(n, shift), _beta),
        ),
        Schedule(
            "former_normal",
            "Normal",
            "zimage_rt 0.1",
            "`normal` as 0.1 rounded it: 1e-7 beside ComfyUI's. For images that were drawn with it.",
            _former_normal,
        ),
        Schedule(
            "simple",
            "Simple",
            "ComfyUI",
            "Even steps through the table of 1000 sigmas, its index truncated.",
            _comfyui_simple,
        ),
        Schedule(
            "normal",
            "Normal",
            "ComfyUI",
            "Even steps down to the table's last sigma, then shifted: ends higher than simple.",
            _comfyui_normal,
        ),
        Schedule(
            "sgm_uniform",
            "SGM Uniform",
            "ComfyUI",
            "As normal with one step more, the last left out: goes to 0 in one long step.",
            _comfyui_sgm_uniform,
        ),
        Schedule(
            "karras",
            "Karras",
            "ComfyUI",
            "Karras' spacing, rho 7, over the whole table: most steps at low noise.",
            _comfyui_karras,
        ),
        Schedule(
            "exponential",
            "Exponential",
            "ComfyUI",
            "Even in the logarithm over the whole table: still more steps at low noise.",
            _comfyui_exponential,
        ),
        Schedule(
            "ddim_uniform",
            "DDIM",
            "ComfyUI",
            "Every k-th of the table: does not begin at 1, and may have one step more than asked for.",
            _comfyui_ddim_uniform,
        ),
        Schedule(
            "beta",
            "Beta",
            "ComfyUI",
            "The table by Beta(0.6, 0.6): steps gather at both ends; may have fewer than asked for.",
            _comfyui_beta,
        ),
        Schedule(
            "linear_quadratic",
            "Linear Quadratic",
            "ComfyUI",
            "Mochi's: half of the steps above sigma 0.975, the others quadratic; knows no shift.",
            _comfyui_linear_quadratic,
        ),
        Schedule(
            "kl_optimal",
            "KL Optimal",
            "ComfyUI",
            "Even angles between the arc tangents of the table's ends.",
            _comfyui_kl_optimal,
        ),
    )
}
DEFAULT_SCHEDULE = "diffusers_simple"


def schedule_sigmas(name: str, num_inference_steps: int, shift: float, *, spare_step: bool = False) -> np.ndarray:
    """A schedule's sigmas; with `spare_step`, those of one more step without the last sigma before 0.

    ComfyUI does so for the samplers that would waste an evaluation there (`Sampler.spare_step`).
    """
    sigmas = SCHEDULES[name].sigmas(num_inference_steps + spare_step, shift)
    return np.append(sigmas[:-2], sigmas[-1:]) if spare_step else sigmas


def denoise_sigmas(
    name: str, num_inference_steps: int, shift: float, denoise: float, *, spare_step: bool = False
) -> np.ndarray:
    """ComfyUI's denoise: the last `num_inference_steps` of a schedule of int(steps / denoise) steps.

    Above 0.9999 it is the whole schedule.
    """
    if denoise > 0.9999:
        return schedule_sigmas(name, num_inference_steps, shift, spare_step=spare_step)
    longer = schedule_sigmas(name, int(num_inference_steps / denoise), shift, spare_step=spare_step)
    return longer[-(num_inference_steps + 1) :]


def first_step(num_inference_steps: int, strength: float) -> int:
    """The first step of image-to-image, which runs the last `strength * N` of N steps.

    Rounds as `get_timesteps` of diffusers' ZImageImg2ImgPipeline does.
    """
    return int(max(num_inference_steps - min(num_inference_steps * strength, num_inference_steps), 0))


def add_noise(image: np.ndarray, noise: np.ndarray, sigma: np.float32) -> np.ndarray:
    """Latents of an image at a noise level: `sigma * noise + (1 - sigma) * image`, float32."""
    return sigma * noise + (np.float32(1) - sigma) * image
