"""The cases of `data/comfyui_samplers.npz`: what ComfyUI's samplers make of an analytic denoiser.

The denoiser is D(x, sigma) = 0.3 x + 0.5 tanh(x) (1 - sigma) + P. A case is `sampler|schedule|steps|denoise|seed`;
noise and sampler have the same seed, and below denoise 1 the latents L lie under the noise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from zimage_rt import _core
from zimage_rt.sampling.samplers import SAMPLERS, sampler_table, step_noise
from zimage_rt.sampling.schedules import denoise_sigmas

SHIFT = 3.0
C, H, W = np.meshgrid(np.arange(16), np.arange(8), np.arange(8), indexing="ij")
P = (0.25 * np.sin(0.7 * C + 0.5 * H + 0.3 * W)).astype(np.float32)
L = (0.8 * np.cos(0.4 * C - 0.6 * H + 0.2 * W)).astype(np.float32)
# The largest difference of the latents. ComfyUI takes 1 - 1 / (1 + sigma^2) of small sigmas in float32 for UniPC: a
# last place is 6 % of the last step.
TOLERANCES = {"uni_pc": 1e-3, "uni_pc_bh2": 1e-3}
TOLERANCE = 1e-4
COMFYUI = [name for name, sampler in SAMPLERS.items() if sampler.source != "diffusers"]


def load_reference() -> dict[str, np.ndarray]:
    """Every array of the file."""
    with np.load(Path(__file__).parents[1] / "data" / "comfyui_samplers.npz") as file:
        return dict(file)


def predict(latents: np.ndarray, timestep: float, guided: bool, noise_pred: np.ndarray) -> None:
    """The denoiser, as the loop calls one."""
    assert not guided
    sigma = np.float32(1) - np.float32(timestep)
    clean = np.float32(0.3) * latents + np.float32(0.5) * np.tanh(latents) * (1 - sigma) + P
    noise_pred[:] = (latents - clean) / sigma


def start(case: str, batch: int = 1) -> dict[str, Any]:
    """The denoiser, and the fields of the job."""
    name, schedule, steps, denoise, seed = case.split("|")
    sigmas = denoise_sigmas(schedule, int(steps), SHIFT, float(denoise), spare_step=SAMPLERS[name].spare_step)
    noise = _core.randn(int(seed), [batch, 16, 8, 8])
    image = L if float(denoise) < 1 else np.zeros_like(L)
    table = sampler_table(name, sigmas, SHIFT)
    return {
        "predict": predict,
        "steps": table,
        "latents": (sigmas[0] * noise + (1 - sigmas[0]) * image).astype(np.float32),
        "step_noise": step_noise(name, sigmas, SHIFT, [int(seed)] * batch, (16, 8, 8), joint=True),
    }


def small_cases(reference: dict[str, np.ndarray], name: str) -> list[int]:
    """The rows of a sampler: every schedule, four numbers of steps, three values of denoise."""
    cases = [i for i, case in enumerate(reference["small_cases"]) if case.split("|")[0] == name]
    assert len(cases) == 9 * 4 * 3
    return cases


def check_small(reference: dict[str, np.ndarray], row: int, latents: np.ndarray, evaluations: int) -> None:
    """Compare a case's latents, of which the file holds every fourth row and column, and its evaluations."""
    case = str(reference["small_cases"][row])
    assert evaluations == reference["small_calls"][row], case
    difference = np.abs(latents[0, :, ::4, ::4].ravel() - reference["small"][row]).max()
    assert difference < TOLERANCES.get(case.split("|")[0], TOLERANCE), case
