"""The rows of samplers that add no noise between steps. Terms and notation: `tables.py`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from .tables import HISTORY, CleanHistory, SamplerStep, exponential_2, step_pairs, to_clean


def euler(sigmas: np.ndarray, shift: float) -> list[SamplerStep]:
    """Euler: x + v (sigma' - sigma)."""
    del shift
    # The difference is in float32, as in diffusers.
    return [
        SamplerStep(float(sigma), float(following), pred=float(following - sigma))
        for sigma, following in itertools.pairwise(sigmas)
    ]


def heun(sigmas: np.ndarray, shift: float) -> list[SamplerStep]:
    """Heun's method of second order: the mean of the slopes at both ends. The last step, to 0, is an Euler step."""
    del shift
    steps: list[SamplerStep] = []
    for sigma, following in step_pairs(sigmas):
        delta = following - sigma
        if following == 0.0:
            steps.append(SamplerStep(sigma, following, pred=delta))
            continue
        steps.append(SamplerStep(sigma, following, pred=delta, keep_pred=1.0, ends=0.0))
        # The first row made the whole step with the first slope; this one replaces half of it by the second slope.
        steps.append(SamplerStep(following, following, pred=delta / 2, history=(-delta / 2, 0.0, 0.0)))
    return steps


def dpm_2(sigmas: np.ndarray, shift: float) -> list[SamplerStep]:
    """DPM-Solver-2 (Lu et al. 2022): the whole step with the slope at the geometric mean of both sigmas."""
    del shift
    steps: list[SamplerStep] = []
    for sigma, following in step_pairs(sigmas):
        if following == 0.0:
            steps.append(to_clean(sigma))
            continue
        middle = math.sqrt(sigma * following)
        steps.append(SamplerStep(sigma, middle, pred=middle - sigma, keep_pred=1.0, ends=0.0))
        steps.append(SamplerStep(middle, following, pred=following - sigma, history=(sigma - middle, 0.0, 0.0)))
    return steps


def gradient_estimation(sigmas: np.ndarray, shift: float) -> list[SamplerStep]:
    """Gradient estimation (Permenter and Yuan 2023, gamma 2): x + (2 v - previous v) (sigma' - sigma)."""
    del shift
    steps: list[SamplerStep] = []
    for i, (sigma, following) in enumerate(step_pairs(sigmas)):
        delta = following - sigma
        if following == 0.0:
            steps.append(to_clean(sigma))
        elif i == 0:
            steps.append(SamplerStep(sigma, following, pred=delta, keep_pred=1.0))
        else:
            steps.append(SamplerStep(sigma, following, pred=2 * delta, history=(-delta, 0.0, 0.0), keep_pred=1.0))
    return steps


def dpmpp_2m(sigmas: np.ndarray, shift: float) -> list[SamplerStep]:
    """DPM-Solver++(2M) (Lu et al. 2022) in ln sigma instead of lambda, which ComfyUI uses for every model."""
    del shift
    steps: list[SamplerStep] = []
    kept = CleanHistory(1)
    before = 0.0
    for i, (sigma, following) in enumerate(step_pairs(sigmas)):
        if following == 0.0:
            steps.append(to_clean(sigma))
            continue
        ratio = following / sigma
        second = 0.0
        if i > 0:
            second = (1 - ratio) * math.log(sigma / following) / math.log(before / sigma) / 2
        steps.append(kept.row(sigma, following, x=ratio, clean=(1 - ratio + second, -second)))
        before = sigma
    return steps


def _half_log_snr(sigma: float) -> float:
    """lambda = ln((1 - sigma) / sigma)."""
    if sigma >= 1.0:
        return -math.inf
    return math.inf if sigma <= 0.0 else math.log1p(-sigma) - math.log(sigma)


def diffusers_dpmpp_2m(sigmas: np.ndarray, shift: float) -> list[SamplerStep]:
    """DPM-Solver++(2M) in lambda, as in diffusers' DPMSolverMultistepScheduler for flow models (midpoint).

    The first step, a step after one from pure noise, and the last step are of first order.
    """
    del shift
    steps: list[SamplerStep] = []
    before = -math.inf  # lambda of the last step's start
    for i, (sigma, following) in enumerate(step_pairs(sigmas)):
        here, there = _half_log_snr(sigma), _half_log_snr(following)
        # alpha_t (1 - exp(-h)), the weight of D; h is infinite from sigma 1 and to sigma 0.
        weight = (1 - following) * -math.expm1(here - there)
        second = 0.0
        if i > 0 and following > 0.0 and math.isfinite(before):
            second = 0.5 * weight * (there - here) / (here - before)
        clean = weight + second
        steps.append(
            SamplerStep(
                sigma,
                following,
                x=following / sigma + clean,
                pred=-sigma * clean,
                history=(-second, 0.0, 0.0),
                keep_x=1.0,
                keep_pred=-sigma,
            )
        )
        before = here
    return steps


def res_multistep(sigmas: np.ndarray, shift: float) -> list[SamplerStep]:
    """RES, the refined exponential solver (Zhang et al. 2023), with two steps in ln sigma.

    The first and the last step are Euler steps.
    """
    del shift
    steps: list[SamplerStep] = []
    kept = CleanHistory(1)
    before = None
    for sigma, following in step_pairs(sigmas):
        if following == 0.0:
            steps.append(to_clean(sigma))
            continue
        if before is None:
            ratio = following / sigma
            steps.append(kept.row(sigma, following, x=ratio, clean=(1 - ratio,)))
        else:
            offset = -math.log(before / sigma) / math.log(sigma / following)
            x, clean, last = exponential_2(sigma, following, offset)
            steps.append(kept.row(sigma, following, x=x, clean=(clean, last)))
        before = sigma
    return steps


def uni_pc(sigmas: np.ndarray, shift: float) -> list[SamplerStep]:
    """UniPC, B1(h) = h."""
    del shift
    return _uni_pc(sigmas, bh2=False)


def uni_pc_bh2(sigmas: np.ndarray, shift: float) -> list[SamplerStep]:
    """UniPC, B2(h) = exp(h) - 1."""
    del shift
    return _uni_pc(sigmas, bh2=True)


class _UniStep:
    """One step of UniPC (Zhao et al. 2023, algorithms 5 to 8) on z = x / sqrt(1 + sigma^2), lambda = -ln sigma.

    z' = x * z + base * D0 + sum_k weight_k * (D_k - D0) / r_k + rest * (D' - D0). D0 is at the step's beginning, D_k
    at the steps before it, and D' at its end, which only the corrector has.
    """

    def __init__(self, sigmas: Sequence[float], order: int, bh2: bool) -> None:
        """`sigmas` are the step's end, its beginning, and earlier ones: `order + 1` in all."""
        (alpha, spread, end), (_, spread_start, start), *before = (_uni_terms(sigma) for sigma in sigmas)
        h = end - start
        self.x = spread / spread_start
        phi_1 = math.expm1(-h)
        self.base = -alpha * phi_1
        self.ratios = [(past - start) / h for _, _, past in before]
        step = phi_1 if bh2 else -h
        rhs = []
        phi, factorial = phi_1 / -h - 1, 1
        for i in range(1, order + 1):
            rhs.append(phi * factorial / step)
            factorial *= i + 1
            phi = phi / -h - 1 / factorial
        matrix = np.vander([*self.ratios, 1.0], order, increasing=True).T
        scale = -alpha * step
        corrector = np.array([0.5]) if order == 1 else np.linalg.solve(matrix, rhs)
        if order == 2:
            predictor = np.array([0.5])
        else:
            predictor = np.linalg.solve(matrix[:-1, :-1], rhs[:-1]) if order > 2 else np.empty(0)
        self.predict = [float(scale * weight) for weight in predictor]
        self.correct = [float(scale * weight) for weight in corrector[:-1]]
        self.rest = float(scale * corrector[-1])

    def of_past(self, weights: Sequence[float]) -> list[float]:
        """The weights of the differences, rewritten as weights of D0, D1, …"""
        shares = [weight / ratio for weight, ratio in zip(weights, self.ratios, strict=True)]
        return [-sum(shares), *shares]


def _uni_terms(sigma: float) -> tuple[float, float, float]:
    """alpha, spread and lambda of z, in float32 as in ComfyUI: the rounding of 1 - alpha^2 changes small sigmas.

    The logarithm and the exponential are rounded from float64, which equals float32 up to a unit in the last place.
    """
    square = np.float32(sigma) * np.float32(sigma) + np.float32(1)
    log_alpha = np.float32(0.5) * np.float32(math.log(float(np.float32(1) / square)))
    rest = np.float32(1) - np.float32(math.exp(float(np.float32(2) * log_alpha)))
    spread = np.sqrt(rest)
    log_spread = np.float32(0.5) * np.float32(math.log(float(rest)))
    return math.exp(float(log_alpha)), float(spread), float(log_alpha - log_spread)


def _uni_pc(sigmas: np.ndarray, *, bh2: bool) -> list[SamplerStep]:
    """UniPC of order 3, lower near both ends, as in ComfyUI.

    The last 0 becomes 0.001, and the result is divided by 1 - 0.001. The corrector needs no evaluation of its own: the
    evaluation at a step's end corrects that end and begins the next step, so that one row does both.
    """
    whole = [float(sigma) for sigma in sigmas.astype(np.float64)]
    path = [*whole[:-1], float(np.float32(0.001))] if whole[-1] == 0 else whole
    count = len(path) - 1
    steps: list[SamplerStep] = []
    kept = CleanHistory(HISTORY)
    last: _UniStep | None = None
    for i in range(count):
        order = max(1, min(3, count - 1, i + 1, count - i))
        sigma, following = path[i], path[i + 1]
        step = _UniStep([following, *path[i::-1]][: order + 1], order, bh2)
        grown, grown_next = math.hypot(1, sigma), math.hypot(1, following)
        clean = [0.0] * (HISTORY + 1)  # weights of D0, D1, D2, D3 in z
        if last is not None:
            # The corrected beginning minus the predicted one: only the weights of D differ.
            clean[0] += last.rest
            clean[1] -= last.rest
            predicted = last.of_past(last.predict) if last.predict else []
            for sign, weights in ((1, last.of_past(last.correct)), (-1, predicted)):
                for age, weight in enumerate(weights):
                    clean[age + 1] += sign * weight
        clean = [step.x * weight for weight in clean]
        clean[0] += step.base
        for age, weight in enumerate(step.of_past(step.predict) if step.predict else []):
            clean[age] += weight
        final = i == count - 1
        scale = grown_next / (1 - following if final and whole[-1] == 0 else 1)
        steps.append(
            kept.row(
                sigma,
                whole[i + 1],
                x=step.x / grown * scale,
                clean=[weight * scale for weight in clean],
            )
        )
        last = step
    return steps
