"""The C++ runtime against torch, diffusers and the numpy references."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from sample_jobs import sample_job
from sampler_reference import apply_guidance, sample_reference

from zimage_rt import _core
from zimage_rt.backends.base import Inpaint
from zimage_rt.sampling.guidance import guidance_scales
from zimage_rt.sampling.samplers import sampler_table, step_noise
from zimage_rt.sampling.schedules import flow_match_sigmas


@pytest.mark.parametrize("shape", [(1, 16, 32, 32), (1,), (2,), (5,), (15,), (16,), (17,), (3, 7, 11)])
@pytest.mark.parametrize("seed", [0, 42, 2**32 - 1, 2**40 + 5, 2**64 - 1])
def test_randn_gives_torchs_numbers(shape: tuple[int, ...], seed: int) -> None:
    import torch

    # torch takes seeds as signed 64-bit numbers or the same bits unsigned.
    expected = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)).numpy()
    actual = _core.randn(seed, list(shape))
    # A last-place difference of log, sin or cos, of which a processor may have others: torch's own results differ as
    # much. Numbers lie below 8, where one place is 4.8e-7.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6)


def test_seeds_that_share_their_low_32_bits_share_the_noise() -> None:
    noise = _core.randn(7, [1, 16, 8, 8])
    assert np.array_equal(noise, _core.randn(7 + 2**32, [1, 16, 8, 8]))
    assert not np.array_equal(noise, _core.randn(7 + 2**31, [1, 16, 8, 8]))
    sigmas = flow_match_sigmas(4, 3.0)
    for sampler, shares in (("euler_ancestral", True), ("dpmpp_2m_sde", False)):
        first, second = (step_noise(sampler, sigmas, 3.0, (seed,), (16, 8, 8), joint=False) for seed in (7, 7 + 2**32))
        assert first is not None and second is not None
        assert np.array_equal(first, second) == shares


@pytest.mark.parametrize("steps", [1, 2, 8, 9, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
def test_sigmas_equal_diffusers(steps: int, shift: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=False)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist(), mu=0.5)
    reference = flow_match_sigmas(steps, shift)
    # One rounding to fp32 (6e-8 below 1): division and product are exact operations, the same on every processor.
    np.testing.assert_allclose(reference, scheduler.sigmas.numpy(), rtol=0, atol=1e-7)


def test_sigmas_refuse_nonsense() -> None:
    with pytest.raises(ValueError, match="num_inference_steps"):
        flow_match_sigmas(0, 3.0)
    with pytest.raises(ValueError, match="shift"):
        flow_match_sigmas(8, float("nan"))


@pytest.mark.parametrize("normalization", [0.0, 0.5, 1.0, 100.0])
def test_guidance_equals_its_reference(normalization: float) -> None:
    rng = np.random.default_rng(0)
    positive, negative = rng.standard_normal((2, 3, 16, 4, 6)).astype(np.float32)

    def predict(latents: np.ndarray, timestep: float, guided: bool, noise_pred: np.ndarray) -> None:
        noise_pred[:] = np.concatenate([positive, negative])

    # latents = 0 * latents + 1 * noise_pred: the guided prediction itself.
    steps = np.array([[1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1]], np.float32)
    actual = np.zeros_like(positive)
    assert _core.sample(predict, sample_job(steps, actual, np.full((1, 3), 4.0, np.float32), normalization))
    expected = apply_guidance(positive.copy(), negative, 4.0, normalization)
    # The norms are summed in double precision; what is left are three fp32 operations of numbers below 32 (2e-6).
    np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=2e-6)


def test_guidance_is_active_as_in_diffusers() -> None:
    for scale, truncation, timestep in [(0, 1, 0.5), (4, 1, 0.99), (4, 0.5, 0.4), (4, 0.5, 0.6), (4, 2.0, 1.0)]:
        expected = scale > 0 and not (truncation <= 1 and timestep > truncation)
        scales = guidance_scales(np.array([1 - timestep]), scale, truncation, 0.0, [5, 9])
        assert scales.shape == (1, 2)
        assert (scales == (scale if expected else 0)).all()


def test_dynamic_guidance_follows_the_prompt_and_the_step() -> None:
    scales = guidance_scales(np.array([1.0, 0.5, 0.1]), 4.0, 1.0, 0.5, [8, 64, 128, 500])
    assert (np.diff(scales, axis=0) < 0).all()  # less as the image settles
    assert (np.diff(scales[:, :3], axis=1) > 0).all()  # more for a longer prompt
    assert (scales[:, 2] == scales[:, 3]).all()  # up to a length
    assert scales[0, 1] == 4.0  # a prompt of half that length, at the start: the scale itself


def smooth(latents: np.ndarray, timestep: float, guided: bool, noise_pred: np.ndarray) -> None:
    """A model that costs nothing."""
    noise_pred[: len(latents)] = np.sin(latents * 3 + timestep)
    if guided:
        noise_pred[len(latents) :] = np.cos(latents + timestep)


@pytest.mark.parametrize("guidance", [(0.0, 1.0, 0.0), (3.5, 1.0, 0.0), (3.5, 0.4, 0.9)])
@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "dpmpp_3m_sde", "uni_pc"])
@pytest.mark.parametrize("masked", [False, True])
def test_cpp_loop_equals_numpy_loop(guidance: tuple[float, float, float], sampler: str, masked: bool) -> None:
    rng = np.random.default_rng(0)
    latents, image, noise = rng.standard_normal((3, 2, 16, 4, 6)).astype(np.float32)
    mask = rng.random((2, 1, 4, 6)).astype(np.float32)
    sigmas = flow_match_sigmas(8, 3.0)
    steps = sampler_table(sampler, sigmas, 3.0)
    drawn = step_noise(sampler, sigmas, 3.0, [3, 4], (16, 4, 6), joint=False)
    scale, truncation, normalization = guidance
    scales = guidance_scales(steps[:, 0], scale, truncation, 0.3, [7, 200])
    scales[-2:, 0] = 0  # one sample of a batch may be guided alone
    actual = latents.copy()
    inpainting = Inpaint(mask, image, noise) if masked else None
    job = sample_job(steps, actual, scales, normalization, step_noise=drawn, inpaint=inpainting)
    assert _core.sample(smooth, job)
    inpaint = (mask, image, noise) if masked else None
    expected = sample_reference(smooth, steps, latents, scales, normalization, inpaint, drawn)
    # The same operations in another order: 1e-6 an evaluation, which eight steps of a slope of 3 (of 3 * 3.5 guided)
    # carry on. An error in a sampler's table or in guidance is of the numbers' own size.
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_loop_stops_when_told_and_passes_errors_on() -> None:
    latents = np.ones((1, 16, 2, 2), np.float32)
    seen: list[int] = []

    def predict(latents: np.ndarray, timestep: float, guided: bool, noise_pred: np.ndarray) -> None:
        noise_pred[:] = 1

    def stop(step: int, *rest: object) -> bool:
        seen.append(step)
        return step < 2

    steps = sampler_table("heun", flow_match_sigmas(8, 3.0), 3.0)
    assert not _core.sample(predict, sample_job(steps, latents, on_step=stop))
    assert seen == [0, 1, 2]  # steps of the schedule, not the evaluations inside them

    def fail(*arguments: object) -> None:
        raise KeyError("from Python")

    with pytest.raises(KeyError, match="from Python"):
        _core.sample(fail, sample_job(steps, latents))


def test_a_callback_reads_a_copy_of_the_latents_until_it_returns() -> None:
    latents = np.zeros((1, 16, 2, 2), np.float32)
    steps = sampler_table("euler", flow_match_sigmas(3, 3.0), 3.0)
    read, late = [], []

    def predict(latents: np.ndarray, timestep: float, guided: bool, noise_pred: np.ndarray) -> None:
        noise_pred[:] = 1

    def look(step: int, count: int, sigma: float, sigma_next: float, read_latents: Callable[[], np.ndarray]) -> bool:
        read.append(read_latents())
        late.append(read_latents)
        return True

    assert _core.sample(predict, sample_job(steps, latents, on_step=look))
    assert len({one.tobytes() for one in read}) == 3
    assert read[-1].tobytes() == latents.tobytes() and not read[-1].flags.writeable
    with pytest.raises(RuntimeError, match="ask for them inside"):
        late[0]()


def test_the_loop_refuses_jobs_that_do_not_fit() -> None:
    steps = sampler_table("euler", flow_match_sigmas(2, 3.0), 3.0)
    latents = np.zeros((2, 16, 4, 6), np.float32)
    mask = np.ones((2, 1, 4, 6), np.float32)
    frozen = latents.copy()
    frozen.flags.writeable = False
    for job, problem in (
        (sample_job(steps, latents[0]), "latents: expected"),
        (sample_job(steps, latents[:, ::2]), "C-contiguous"),
        (sample_job(steps, frozen), "may be written"),
        (sample_job(steps[:, :4], latents), "evaluations, 12"),
        (sample_job(steps, latents, np.zeros((2, 1), np.float32)), "guidance_scales"),
        (sample_job(steps, latents, inpaint=Inpaint(mask[:1], latents, latents)), "all three belong together"),
    ):
        with pytest.raises(ValueError, match=problem):
            _core.sample(smooth, job)
    with pytest.raises(TypeError, match="float32"):
        _core.sample(smooth, sample_job(steps, latents.astype(np.float64)))


@pytest.mark.parametrize("soft", [False, True])
def test_paste_keeps_bytes_where_the_mask_is_0(soft):
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 256, (2, 9, 31, 3), dtype=np.uint8)
    original = rng.integers(0, 256, (9, 31, 3), dtype=np.uint8)
    mask = rng.integers(0, 256, (9, 31), dtype=np.uint8) if soft else np.repeat(rng.integers(0, 2, (9, 1)) * 255, 31, 1)
    mask = mask.astype(np.uint8)
    mask[0, :5], mask[8, 26:] = 0, 255
    out = _core.paste(drawn, original, mask)
    weight = mask[:, :, None] / 255
    assert (out == np.rint(drawn * weight + original * (1 - weight))).all()
    assert (out[:, mask == 0] == original[mask == 0]).all()
    assert (out[:, mask == 255] == drawn[:, mask == 255]).all()


def test_paste_refuses_other_sizes():
    drawn, mask = np.zeros((1, 4, 4, 3), np.uint8), np.zeros((4, 5), np.uint8)
    with pytest.raises(ValueError, match="sizes"):
        _core.paste(drawn, drawn[0], mask)
