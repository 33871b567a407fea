"""Samplers as tables: each is a list of function evaluations, with a linear update after each.

One C++ loop runs every table (`csrc/cpu/sampler.cc`).
`SAMPLERS` is the one list of them; their rows are in `deterministic.py` and `stochastic.py`.

Plain names are ComfyUI's and give its numbers (0.33.0, commit 783545f6); names that begin with `diffusers_` give
diffusers' numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from .._core import brownian_noise, stream_noise
from . import deterministic, stochastic
from .tables import SamplerStep

# The source of a sampler's noise between steps: none, a generator of seed + 1, or a Brownian path of the seed.
NONE, STREAM, BROWNIAN = "none", "stream", "brownian"


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A sampler.

    Attributes:
        name: its name in requests.
        label: its name in other programs.
        source: the program whose numbers it gives: `ComfyUI`, `diffusers`, or `both`.
        help: one line of help.
        rows: maps `(sigmas, shift)` to its rows; sigmas are float32 and fall to 0.
        noise: `none`, `stream` or `brownian`.
        spare_step: whether its schedules are made with one more step and lose the last sigma before 0.
    """

    name: str
    label: str
    source: str
    help: str
    rows: Callable[[np.ndarray, float], list[SamplerStep]]
    noise: str = NONE
    spare_step: bool = False


# Every sampler; requests, records, the command line's help and docs/samplers.md use this table.
SAMPLERS: dict[str, Sampler] = {
    sampler.name: sampler
    for sampler in (
        Sampler("euler", "Euler", "both", "The default: one evaluation a step.", deterministic.euler),
        Sampler("heun", "Heun", "both", "Two evaluations a step, second order.", deterministic.heun),
        Sampler(
            "diffusers_dpmpp_2m",
            "DPM++ 2M",
            "diffusers",
            "DPMSolverMultistepScheduler's: second order, in lambda.",
            deterministic.diffusers_dpmpp_2m,
        ),
        Sampler("dpmpp_2m", "DPM++ 2M", "ComfyUI", "Second order, in ln sigma.", deterministic.dpmpp_2m),
        Sampler(
            "res_multistep",
            "RES Multistep",
            "ComfyUI",
            "What the Z-Image templates use: second order, exponential.",
            deterministic.res_multistep,
        ),
        Sampler(
            "dpm_2",
            "DPM2",
            "ComfyUI",
            "Two evaluations a step, the second in the middle.",
            deterministic.dpm_2,
            spare_step=True,
        ),
        Sampler(
            "gradient_estimation",
            "Gradient Estimation",
            "ComfyUI",
            "Euler with twice the slope less the one before.",
            deterministic.gradient_estimation,
        ),
        Sampler(
            "uni_pc",
            "UniPC",
            "ComfyUI",
            "Predictor and corrector of third order.",
            deterministic.uni_pc,
            spare_step=True,
        ),
        Sampler(
            "uni_pc_bh2",
            "UniPC BH2",
            "ComfyUI",
            "The same with the other weighting.",
            deterministic.uni_pc_bh2,
            spare_step=True,
        ),
        Sampler("ddim", "DDIM", "ComfyUI", "Euler by another name.", deterministic.euler),
        Sampler(
            "euler_ancestral",
            "Euler a",
            "ComfyUI",
            "Euler with new noise in every step.",
            stochastic.euler_ancestral,
            STREAM,
        ),
        Sampler(
            "res_multistep_ancestral",
            "RES Multistep a",
            "ComfyUI",
            "RES with new noise in every step.",
            stochastic.res_multistep_ancestral,
            STREAM,
        ),
        Sampler("lcm", "LCM", "ComfyUI", "The clean image under new noise, for few steps.", stochastic.lcm, STREAM),
        Sampler("er_sde", "ER SDE", "ComfyUI", "Third order, with noise.", stochastic.er_sde, STREAM),
        Sampler(
            "dpmpp_sde",
            "DPM++ SDE",
            "ComfyUI",
            "Two evaluations a step, with Brownian noise.",
            stochastic.dpmpp_sde,
            BROWNIAN,
        ),
        Sampler(
            "dpmpp_2m_sde",
            "DPM++ 2M SDE",
            "ComfyUI",
            "Second order, with Brownian noise.",
            stochastic.dpmpp_2m_sde,
            BROWNIAN,
        ),
        Sampler(
            "dpmpp_3m_sde",
            "DPM++ 3M SDE",
            "ComfyUI",
            "Third order, with Brownian noise.",
            stochastic.dpmpp_3m_sde,
            BROWNIAN,
        ),
    )
}
DEFAULT_SAMPLER = "euler"

# Names in 0.1.x, which gave diffusers' numbers, and their names now: for records and journals of that version.
FORMER_SAMPLERS = {"dpmpp_2m": "diffusers_dpmpp_2m"}
FORMER_SCHEDULES = {
    "simple": "diffusers_simple",
    "normal": "former_normal",
    "karras": "diffusers_karras",
    "exponential": "diffusers_exponential",
    "beta": "diffusers_beta",
}


def sampler_table(sampler: str, sigmas: np.ndarray, shift: float) -> np.ndarray:
    """The rows of a sampler over a schedule, float32 `[evaluations, 12]`, the input of the loop."""
    return np.array([step.numbers() for step in SAMPLERS[sampler].rows(sigmas, shift)], np.float32)


def step_noise(
    sampler: str, sigmas: np.ndarray, shift: float, seeds: Sequence[int], sample_shape: tuple[int, ...], *, joint: bool
) -> np.ndarray | None:
    """The noise of a sampler's rows, float32 `[draws, len(seeds), *sample_shape]`; None if they use none.

    Each sample's noise is from its own seed, so that the sample can be repeated alone. With `joint` the batch's noise
    is one array of the first seed, as in ComfyUI. A stream uses seed + 1; a Brownian path uses all 64 bits of the seed
    over the range of the sigmas.
    """
    rows = [step for step in SAMPLERS[sampler].rows(sigmas, shift) if step.noise]
    if not rows:
        return None
    shape = (len(seeds), *sample_shape) if joint else sample_shape
    own = list(seeds[:1] if joint else seeds)
    if SAMPLERS[sampler].noise == BROWNIAN:
        intervals = [step.interval for step in rows if step.interval is not None]
        low = float(sigmas[sigmas > 0].min())
        drawn = brownian_noise(own, low, float(sigmas.max()), intervals, shape)
    else:
        drawn = stream_noise([(seed + 1) % 2**64 for seed in own], len(rows), shape)
    return drawn.reshape(len(rows), len(seeds), *sample_shape)
