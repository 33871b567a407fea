"""Schedules and samplers against diffusers' schedulers, on a model that costs nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from sample_jobs import sample_job

from zimage_rt import _core
from zimage_rt.sampling.samplers import (
    DEFAULT_SAMPLER,
    FORMER_SAMPLERS,
    FORMER_SCHEDULES,
    SAMPLERS,
    sampler_table,
    step_noise,
)
from zimage_rt.sampling.schedules import (
    DEFAULT_SCHEDULE,
    SCHEDULES,
    custom_sigmas,
    first_step,
    flow_match_sigmas,
    schedule_sigmas,
)

SHIFT = 3.0
# fp32 rounds the numbers here, below 8, by up to 2.4e-7 in each operation, over at most 49 evaluations of a slope below
# 1: 2.4e-6 is the most that was measured. Samplers differ from one another by 1e-2 at these steps.
ROUNDING = 2e-5


def slope(latents: Any, sigma: float) -> Any:
    """dx/dsigma of a smooth flow, for numpy and torch alike."""
    return latents * 0.9 - 0.3 * latents * abs(latents) * (1 - sigma) + 0.2


def ours(sampler: str, sigmas: np.ndarray, latents: np.ndarray) -> np.ndarray:
    out = latents.copy()

    def predict(x: np.ndarray, timestep: float, guided: bool, noise_pred: np.ndarray) -> None:
        noise_pred[:] = slope(x, 1 - timestep)

    steps = sampler_table(sampler, sigmas, SHIFT)
    noise = step_noise(sampler, sigmas, SHIFT, [1], out.shape[1:], joint=False)
    assert _core.sample(predict, sample_job(steps, out, step_noise=noise))
    return out


def theirs(scheduler: Any, latents: np.ndarray) -> np.ndarray:
    x = torch.from_numpy(latents.copy())
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        # By its sigma: the solver's timesteps are whole numbers.
        x = scheduler.step(slope(x, float(sigma)), t, x).prev_sample
    return x.numpy()


@pytest.fixture
def latents() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((1, 16, 8, 8)).astype(np.float32)


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 20, 50])
@pytest.mark.parametrize("option", ["karras", "exponential", "beta"])
def test_schedules_are_those_of_diffusers(steps: int, option: str) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT, **{f"use_{option}_sigmas": True})
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist())
    # fp32 against double precision; roots and powers lose a few places of 6e-8.
    np.testing.assert_allclose(
        schedule_sigmas(f"diffusers_{option}", steps, SHIFT), scheduler.sigmas.numpy(), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 8, 30])
def test_every_schedule_falls_from_one_to_zero(name: str, steps: int) -> None:
    sigmas = schedule_sigmas(name, steps, SHIFT)
    assert sigmas.dtype == np.float32
    if name == "ddim_uniform":  # ComfyUI's begins lower, and every 33rd of 1000 is 31 steps
        assert len(sigmas) == steps + 1 + (steps == 30)
        assert 0 < sigmas[0] < 1
    else:
        assert len(sigmas) == steps + 1
        assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert (np.diff(sigmas) < 0).all()


def test_custom_sigmas_are_shifted_as_in_diffusers() -> None:
    given = [0.95, 0.7, 0.31, 0.02]
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    scheduler.set_timesteps(sigmas=given)
    # One rounding to fp32, 6e-8 below 1.
    np.testing.assert_allclose(custom_sigmas(given, SHIFT), scheduler.sigmas.numpy(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("steps", [1, 2, 8, 25])
def test_euler_is_that_of_diffusers(steps: int, latents: np.ndarray) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist())
    difference = ours("euler", flow_match_sigmas(steps, SHIFT), latents) - theirs(scheduler, latents)
    assert np.abs(difference).max() < ROUNDING


@pytest.mark.parametrize("steps", [2, 8, 25])
def test_heun_is_that_of_diffusers(steps: int, latents: np.ndarray) -> None:
    scheduler = FlowMatchHeunDiscreteScheduler(shift=SHIFT)
    scheduler.set_timesteps(steps)
    # Its schedule repeats every sigma but the first and the last, one evaluation each.
    sigmas = np.append(scheduler.sigmas[:-1:2].numpy(), np.float32(0)).astype(np.float32)
    assert len(sampler_table("heun", sigmas, SHIFT)) == len(scheduler.timesteps) == 2 * steps - 1
    assert np.abs(ours("heun", sigmas, latents) - theirs(scheduler, latents)).max() < ROUNDING


@pytest.mark.filterwarnings("ignore:__array__ implementation")
@pytest.mark.parametrize("steps", [2, 8, 25])
@pytest.mark.parametrize("spacing", [{}, {"use_karras_sigmas": True}])
def test_diffusers_dpmpp_2m_is_that_of_diffusers(steps: int, spacing: dict[str, bool], latents: np.ndarray) -> None:
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.numpy()
    if spacing:
        sigmas = schedule_sigmas("diffusers_karras", steps, SHIFT)
        sigmas[0] = 0.9997  # diffusers' solver takes the logarithm of 1 - sigma
        scheduler.sigmas = torch.from_numpy(sigmas)
        scheduler.timesteps = torch.from_numpy(sigmas[:-1] * 1000)
    assert np.abs(ours("diffusers_dpmpp_2m", sigmas, latents) - theirs(scheduler, latents)).max() < ROUNDING


@pytest.mark.parametrize("sampler", [name for name, sampler in SAMPLERS.items() if sampler.noise == "none"])
def test_samplers_find_the_same_end(sampler: str, latents: np.ndarray) -> None:
    """With many steps all of them solve the same equation, also from sigma 1; what is left is Euler's own step error,
    which falls with their number and is a hundred times what fp32 rounds."""
    exact = ours("euler", flow_match_sigmas(1000, SHIFT), latents)
    assert np.abs(ours(sampler, flow_match_sigmas(200, SHIFT), latents) - exact).max() < 0.03


@pytest.mark.parametrize("strength", [0.01, 0.124, 0.125, 0.3, 0.5, 0.6, 0.99, 1.0])
@pytest.mark.parametrize("steps", [1, 8, 9, 50])
def test_image_to_image_begins_where_diffusers_does(steps: int, strength: float) -> None:
    from diffusers import ZImageImg2ImgPipeline

    class Stand:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)

    Stand.scheduler.set_timesteps(steps)
    _, remaining = ZImageImg2ImgPipeline.get_timesteps(Stand, steps, strength, "cpu")
    assert steps - first_step(steps, strength) == remaining


def test_the_registries_say_what_people_choose_from() -> None:
    for registry in (SAMPLERS, SCHEDULES):
        for name, entry in registry.items():
            assert entry.name == name
            assert name.startswith("diffusers_") == (entry.source == "diffusers")
            assert entry.label and entry.help.endswith(".") and "\n" not in entry.help
        assert len({(entry.label, entry.source) for entry in registry.values()}) == len(registry)
    assert DEFAULT_SAMPLER in SAMPLERS and DEFAULT_SCHEDULE in SCHEDULES
    assert set(FORMER_SAMPLERS.values()) <= SAMPLERS.keys()
    assert set(FORMER_SCHEDULES.values()) <= SCHEDULES.keys()


@pytest.mark.parametrize("steps", [1, 2, 4, 5, 8, 10, 20, 25, 40, 50, 100])
def test_the_default_schedule_is_comfyuis_where_steps_divide_1000(steps: int) -> None:
    default = schedule_sigmas(DEFAULT_SCHEDULE, steps, SHIFT)
    np.testing.assert_array_equal(schedule_sigmas("simple", steps, SHIFT), default)


def test_the_page_lists_what_there_is() -> None:
    page = Path(__file__).parents[2] / "docs" / "samplers.py"
    checked = subprocess.run([sys.executable, page, "--check"], capture_output=True, text=True)
    assert checked.returncode == 0, f"run docs/samplers.py: {checked.stderr}"
