"""Samplers, schedules and step noise against ComfyUI's numbers (`tests/data/comfyui_samplers.npz`, its `source`).

Latents are compared, not images: a wrong sampler of a distilled model passes a comparison of images.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from comfyui_cases import COMFYUI, SHIFT, TOLERANCE, TOLERANCES, check_small, load_reference, small_cases, start
from sample_jobs import sample_job
from sampler_reference import sample_reference

from zimage_rt import _core
from zimage_rt.backends.base import SampleJob
from zimage_rt.sampling.samplers import SAMPLERS, step_noise
from zimage_rt.sampling.schedules import denoise_sigmas, schedule_sigmas


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    return load_reference()


def job_of(arguments: dict[str, Any]) -> SampleJob:
    return sample_job(arguments["steps"], arguments["latents"], step_noise=arguments["step_noise"])


def drawn(case: str, batch: int = 1) -> tuple[np.ndarray, int]:
    arguments = start(case, batch)
    assert _core.sample(arguments["predict"], job_of(arguments))
    return arguments["latents"], len(arguments["steps"])


def test_sigmas(reference: dict[str, np.ndarray]) -> None:
    parts = np.split(reference["sigma_values"], np.cumsum(reference["sigma_lengths"])[:-1])
    for case, expected in zip(reference["sigma_cases"], parts, strict=True):
        shift, schedule, steps, denoise, kind = case.split("|")
        sigmas = denoise_sigmas(schedule, int(steps), float(shift), float(denoise), spare_step=kind == "discard")
        if (schedule, steps) == ("kl_optimal", "1") and kind == "all":
            assert np.isnan(expected[0])  # theirs divides 0 by 0
            assert sigmas.tolist() == [1, 0]
            continue
        np.testing.assert_allclose(sigmas, expected, rtol=0, atol=2e-7, err_msg=case)


@pytest.mark.parametrize("name", COMFYUI)
def test_every_schedule_step_count_and_denoise(name: str, reference: dict[str, np.ndarray]) -> None:
    for i in small_cases(reference, name):
        check_small(reference, i, *drawn(str(reference["small_cases"][i])))


def test_seeds_of_64_bits(reference: dict[str, np.ndarray]) -> None:
    assert {case.split("|")[4] for case in reference["latent_cases"]} == {"0", "987654321012345", str(2**64 - 2)}
    for case, expected in zip(reference["latent_cases"], reference["latents"], strict=True):
        difference = np.abs(drawn(str(case))[0][0] - expected).max()
        assert difference < TOLERANCES.get(case.split("|")[0], TOLERANCE), case


def test_a_batch_shares_its_noise(reference: dict[str, np.ndarray]) -> None:
    for case, expected in zip(reference["batch3_cases"], reference["batch3_latents"], strict=True):
        assert np.abs(drawn(str(case), batch=3)[0] - expected).max() < TOLERANCE, case


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_loop_in_numpy_is_the_one_in_cpp(name: str) -> None:
    arguments = start(f"{name}|karras|9|0.5|7")
    expected = sample_reference(
        arguments["predict"],
        arguments["steps"],
        arguments["latents"],
        np.zeros((len(arguments["steps"]), 1), np.float32),
        0.0,
        step_noise=arguments["step_noise"],
    )
    assert _core.sample(arguments["predict"], job_of(arguments))
    np.testing.assert_allclose(arguments["latents"], expected, rtol=1e-5, atol=1e-5)


def test_step_noise_is_theirs(reference: dict[str, np.ndarray]) -> None:
    stream = _core.stream_noise([43], 2, [16, 8, 8])[:, 0]
    np.testing.assert_allclose(stream, reference["step_noise_seed42_first2"], rtol=0, atol=1e-6)
    low, high = map(float, reference["brownian_range"])
    intervals = [(float(a), float(b)) for a, b in reference["brownian_queries"]]
    brownian = _core.brownian_noise([42], low, high, intervals, [16, 8, 8])[:, 0]
    np.testing.assert_allclose(brownian, reference["brownian_noise_seed42"], rtol=0, atol=1e-5)
    single = _core.brownian_noise([42], low, high, intervals[3:4], [16, 8, 8])
    np.testing.assert_array_equal(single[0, 0], brownian[3])  # whatever else was asked for


@pytest.mark.parametrize("name", [name for name, sampler in SAMPLERS.items() if sampler.noise != "none"])
def test_an_image_of_a_batch_has_its_own_noise(name: str) -> None:
    sigmas = schedule_sigmas("simple", 6, SHIFT)
    both = step_noise(name, sigmas, SHIFT, [5, 2**64 - 1], (16, 4, 6), joint=False)
    assert both is not None
    for i, seed in enumerate((5, 2**64 - 1)):
        alone = step_noise(name, sigmas, SHIFT, [seed], (16, 4, 6), joint=False)
        assert alone is not None
        np.testing.assert_array_equal(both[:, i], alone[:, 0])
    for draw in both:
        assert abs(np.corrcoef(draw[0].ravel(), draw[1].ravel())[0, 1]) < 0.15  # of 1,536 values: 0.03 by chance
    assert 0.9 < both.std() < 1.1


def test_the_loop_refuses_noise_that_does_not_fit() -> None:
    arguments = start("euler_ancestral|simple|4|1|1")
    for wrong in (None, arguments["step_noise"][1:], arguments["step_noise"][..., 1:]):
        with pytest.raises(ValueError, match="step_noise"):
            _core.sample(arguments["predict"], job_of(arguments | {"step_noise": wrong}))
