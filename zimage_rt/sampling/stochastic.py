"""The rows of samplers that add noise between steps. Terms and notation: `tables.py`."""

from __future__ import annotations

import math

import numpy as np

from .tables import CleanHistory, SamplerStep, exponential_2, step_pairs, to_clean


def _flow_split(sigma: float, following: float) -> tuple[float, float, float]:
    """Down, scale and noise of a flow's ancestral step: Euler to `down`, a scaling of the latents, and new noise."""
    down = following**2 / sigma
    scale = (1 - following) / (1 - down)
    return down, scale, math.sqrt(max(0.0, following**2 - (down * scale) ** 2))


def euler_ancestral(sigmas: np.ndarray, shift: float) -> list[SamplerStep]:
    """Ancestral Euler: an Euler step below sigma', then noise up to sigma', mixed as in a flow model."""
    del shift
    steps: list[SamplerStep] = []
    for sigma, following in step_pairs(sigmas):
        if following == 0.0:
            steps.append(to_clean(sigma))
            continue
        down, scale, noise = _flow_split(sigma, following)
        clean = (1 - down / sigma) * scale
        x = down / sigma * scale
        steps.append(SamplerStep(sigma, following, x=x + clean, pred=-sigma * clean, noise=noise))
    return steps


def lcm(sigmas: np.ndarray, shift: float) -> list[SamplerStep]:
    """LCM (Luo et al. 2023, latent consistency models): D with new noise."""
    del shift
    return [
        SamplerStep(sigma, following, x=1 - following, pred=-sigma * (1 - following), noise=following)
        for sigma, following in step_pairs(sigmas)
    ]


def _lambda(sigma: float) -> float:
    """lambda in float32, as in ComfyUI: a middle that rounds otherwise gets other noise of the Brownian path.

    The logarithm is computed in float64, so that it does not depend on the machine.
    """
    value = np.float32(sigma)
    return float(np.float32(-math.log(float(value / (np.float32(1) - value)))))


def _lambda_midpoint(sigma: float, following: float) -> float:
    """The sigma at the middle in lambda, in float32 for the same reason."""
    here, there = np.float32(_lambda(sigma)), np.float32(_lambda(following))
    middle = there - (there - here) * np.float32(0.5)
    return float(np.float32(1) / (np.float32(1) + np.float32(math.exp(float(middle)))))


def _clamp_first_sigma(sigmas: np.ndarray, shift: float) -> np.ndarray:
    """The sigmas with a first sigma of 1, whose lambda is infinite, replaced by that of timestep 0.9999."""
    if sigmas[0] < 1:
        return sigmas
    t = np.float32(0.9999)
    near = np.float32(shift) * t / (np.float32(1) + np.float32(shift - 1) * t)
    return np.append(near, sigmas[1:])


def dpmpp_2m_sde(sigmas: np.ndarray, shift: float) -> list[SamplerStep]:
    """SDE-DPM-Solver++(2M), midpoint, in lambda, eta 1."""
    steps: list[SamplerStep] = []
    kept = CleanHistory(1)
    before = None  # width of the last step in lambda
    for sigma, following in step_pairs(_clamp_first_sigma(sigmas, shift)):
        if following == 0.0:
            steps.append(to_clean(sigma))
            continue
        h = _lambda(following) - _lambda(sigma)
        weight = (1 - following) * -math.expm1(-2 * h)
        second = 0.0 if before is None else 0.5 * weight * h / before
        steps.append(
            kept.row(
                sigma,
                following,
                x=following / sigma * math.exp(-h),
                clean=(weight + second, -second),
                noise=following * math.sqrt(-math.expm1(-2 * h)),
                interval=(sigma, following),
            )
        )
        before = h
    return steps


def dpmpp_3m_sde(sigmas: np.ndarray, shift: float) -> list[SamplerStep]:
    """SDE-DPM-Solver++(3M) in lambda, eta 1: second and third order by the D of the last two steps."""
    steps: list[SamplerStep] = []
    kept = CleanHistory(2)
    widths: list[float] = []  # of the last steps in lambda, the latest first
    for sigma, following in step_pairs(_clamp_first_sigma(sigmas, shift)):
        if following == 0.0:
            steps.append(to_clean(sigma))
            continue
        h = _lambda(following) - _lambda(sigma)
        decay = math.expm1(-2 * h)
        phi_2 = decay / (2 * h) + 1
        phi_3 = phi_2 / (2 * h) - 0.5
        alpha = 1 - following
        clean = [-alpha * decay, 0.0, 0.0]
        if len(widths) == 1:
            weight = alpha * phi_2 * h / widths[0]
            clean = [clean[0] + weight, -weight, 0.0]
        elif len(widths) > 1:
            r0, r1 = widths[0] / h, widths[1] / h
            # first = e0 + r0 q, second = q with q = (e0 - e1) / (r0 + r1)
            of_e0 = alpha * (phi_2 * (1 + r0 / (r0 + r1)) - phi_3 / (r0 + r1))
            of_e1 = alpha * (phi_3 - phi_2 * r0) / (r0 + r1)
            clean = [clean[0] + of_e0 / r0, of_e1 / r1 - of_e0 / r0, -of_e1 / r1]
        steps.append(
            kept.row(
                sigma,
                following,
                x=following / sigma * math.exp(-h),
                clean=clean,
                noise=following * math.sqrt(-decay),
                interval=(sigma, following),
            )
        )
        widths = [h, *widths[:1]]
    return steps


def _ancestral_split(sigma: float, following: float) -> tuple[float, float]:
    """The lower sigma of an ancestral step, and the noise back up to sigma', for noise that is added, not mixed."""
    up = min(following, following * math.sqrt(max(0.0, 1 - (following / sigma) ** 2)))
    return math.sqrt(following**2 - up**2), up


def dpmpp_sde(sigmas: np.ndarray, shift: float) -> list[SamplerStep]:
    """DPM-Solver++ SDE of two stages, r 1/2, eta 1: a step to the middle in lambda, the whole step with its D."""
    steps: list[SamplerStep] = []
    for sigma, following in step_pairs(_clamp_first_sigma(sigmas, shift)):
        if following == 0.0:
            steps.append(to_clean(sigma))
            continue
        middle = _lambda_midpoint(sigma, following)

        def to(end: float, sigma: float = sigma) -> tuple[float, float, float]:
            """Weights of x, D and noise of the step to `end`; the ancestral split is in sigma / (1 - sigma)."""
            start, stop = sigma / (1 - sigma), end / (1 - end)
            down, up = _ancestral_split(start, stop)
            share = down / start
            return (1 - end) / (1 - sigma) * share, (1 - end) * (1 - share), (1 - end) * up

        x, clean, noise = to(middle)
        steps.append(
            SamplerStep(
                sigma,
                middle,
                x=x + clean,
                pred=-sigma * clean,
                noise=noise,
                keep_x=1.0,
                ends=0.0,
                interval=(sigma, middle),
            )
        )
        x, clean, noise = to(following)
        steps.append(
            SamplerStep(
                middle,
                following,
                x=clean,
                pred=-middle * clean,
                history=(x, 0.0, 0.0),
                noise=noise,
                interval=(sigma, following),
            )
        )
    return steps


def res_multistep_ancestral(sigmas: np.ndarray, shift: float) -> list[SamplerStep]:
    """RES with ancestral noise: a step below sigma', then added noise, as for models that are no flows."""
    del shift
    steps: list[SamplerStep] = []
    kept = CleanHistory(1)
    before = None  # sigma and `down` of the last step
    for sigma, following in step_pairs(sigmas):
        down, up = _ancestral_split(sigma, following)
        if down == 0.0:
            steps.append(SamplerStep(sigma, following, x=1.0, pred=-sigma, noise=up, keep_x=1.0, keep_pred=-sigma))
        elif before is None:
            ratio = down / sigma
            steps.append(kept.row(sigma, following, x=ratio, clean=(1 - ratio,), noise=up))
        else:
            offset = -math.log(before[0] / before[1]) / math.log(sigma / down)
            x, clean, last = exponential_2(sigma, down, offset)
            steps.append(kept.row(sigma, following, x=x, clean=(clean, last), noise=up))
        before = (sigma, down)
    return steps


def er_sde(sigmas: np.ndarray, shift: float) -> list[SamplerStep]:
    """ER-SDE-Solver-3 (Cui et al. 2023) with the noise scale e (exp(e^0.3) + 10) of e = sigma / (1 - sigma)."""
    steps: list[SamplerStep] = []
    kept = CleanHistory(2)
    past: list[float] = []  # e of the last steps, the latest first

    def scale(e: np.ndarray | float) -> np.ndarray:
        return e * (np.exp(np.power(e, 0.3)) + 10)

    for sigma, following in step_pairs(_clamp_first_sigma(sigmas, shift)):
        if following == 0.0:
            steps.append(to_clean(sigma))
            continue
        here, there = sigma / (1 - sigma), following / (1 - following)
        ratio = float(scale(there) / scale(here))
        alpha, width = 1 - following, there - here
        points = there - np.arange(200) * width / 200
        clean = [alpha * (1 - ratio), 0.0, 0.0]
        if past:
            # D-hat = (D - D1) / (e - e1)
            total = float(np.sum(1 / scale(points))) * -width / 200
            weight = alpha * (width + total * float(scale(there)))
            gap = here - past[0]
            clean[0] += weight / gap
            clean[1] -= weight / gap
            if len(past) > 1:
                # (D-hat - D-hat before) / ((e - e2) / 2)
                moment = float(np.sum((points - here) / scale(points))) * -width / 200
                weight = alpha * (width**2 / 2 + moment * float(scale(there))) / ((here - past[1]) / 2)
                older = past[0] - past[1]
                clean[0] += weight / gap
                clean[1] -= weight / gap + weight / older
                clean[2] += weight / older
        steps.append(
            kept.row(
                sigma,
                following,
                x=alpha / (1 - sigma) * ratio,
                clean=clean,
                noise=alpha * math.sqrt(max(0.0, there**2 - (here * ratio) ** 2)),
            )
        )
        past = [here, *past[:1]]
    return steps
