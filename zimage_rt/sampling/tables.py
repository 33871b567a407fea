"""The rows of every sampler: function evaluations with a linear update behind each.

x are the latents, v the prediction, sign flipped, so that dx/dsigma = v; the clean image is D = x - sigma v. A step
goes from sigma to sigma'. Flow models have x = (1 - sigma) image + sigma noise; lambda = ln((1 - sigma) / sigma).

Coefficients are in float64 from float32 sigmas; the loop is in float32. What the samplers are is in docs/samplers.md;
those of ComfyUI are held to its numbers by tests/sampling/test_comfyui_samplers.py.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

HISTORY = 3


@dataclasses.dataclass(frozen=True)
class SamplerStep:
    """One row: an evaluation at `sigma`, and the linear update behind it.

    `csrc/cpu/sampler.h` has the same fields in the same order, and says what they do. `interval` is for
    noise of a Brownian path alone: which of its increments is added.
    """

    sigma: float
    sigma_next: float
    x: float = 1.0
    pred: float = 0.0
    history: tuple[float, float, float] = (0.0, 0.0, 0.0)
    noise: float = 0.0
    keep_x: float = 0.0
    keep_pred: float = 0.0
    slot: int = 0
    ends: float = 1.0
    interval: tuple[float, float] | None = None

    def numbers(self) -> tuple[float, ...]:
        """The row of the loop's table."""
        return (
            *(self.sigma, self.sigma_next, self.x, self.pred),
            *self.history,
            *(self.noise, self.keep_x, self.keep_pred, float(self.slot), self.ends),
        )


def _in_slots(values: dict[int, float]) -> tuple[float, float, float]:
    first, second, third = (values.get(slot, 0.0) for slot in range(HISTORY))
    return first, second, third


class _CleanHistory:
    """The D of the last steps, in slots by turns: row i writes slot i % size over the oldest."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._count = 0  # of the rows so far

    def row(
        self,
        sigma: float,
        following: float,
        *,
        x: float,
        clean: Sequence[float],
        noise: float = 0.0,
        interval: tuple[float, float] | None = None,
    ) -> SamplerStep:
        """x' = x * latents + clean[0] * D + clean[1] * D of the row before + … + noise."""
        index = self._count
        self._count += 1
        history = {(index - age) % self._size: weight for age, weight in enumerate(clean) if age > 0}
        return SamplerStep(
            sigma,
            following,
            x=x + clean[0],
            pred=-sigma * clean[0],
            history=_in_slots(history),
            noise=noise,
            keep_x=1.0,
            keep_pred=-sigma,
            slot=index % self._size,
            interval=interval,
        )


def _steps(sigmas: np.ndarray) -> Iterator[tuple[float, float]]:
    return ((float(a), float(b)) for a, b in itertools.pairwise(sigmas.astype(np.float64)))


def _to_clean(sigma: float) -> SamplerStep:
    """The last row: it ends at sigma 0 with D."""
    return SamplerStep(sigma, 0.0, pred=-sigma)


def euler(sigmas: np.ndarray, shift: float) -> list[SamplerStep]:
    """x + v (sigma' - sigma)."""
    del shift
    # The difference in float32, as diffusers takes it.
    return [
        SamplerStep(float(sigma), float(following), pred=float(following - sigma))
        for sigma, following in itertools.pairwise(sigmas)
    ]


def heun(sigmas: np.ndarray, shift: float) -> list[SamplerStep]:
    """Heun's second order: the mean of the slopes at both ends; the last step, to 0, is Euler's."""
    del shift
    steps: list[SamplerStep] = []
    for sigma, following in _steps(sigmas):
        delta = following - sigma
        if following == 0.0:
            steps.append(SamplerStep(sigma, following, pred=delta))
            continue
        steps.append(SamplerStep(sigma, following, pred=delta, keep_pred=1.0, ends=0.0))
        # The whole step was taken with the first slope; half of it is taken back for half of the second one.
        steps.append(SamplerStep(following, following, pred=delta / 2, history=(-delta / 2, 0.0, 0.0)))
    return steps


def dpm_2(sigmas: np.ndarray, shift: float) -> list[SamplerStep]:
    """DPM-Solver-2 (Lu et al. 2022): the slope at the geometric middle, and the whole step with it."""
    del shift
    steps: list[SamplerStep] = []
    for sigma, following in _steps(sigmas):
        if following == 0.0:
            steps.append(_to_clean(sigma))
            continue
        middle = math.sqrt(sigma * following)
        steps.append(SamplerStep(sigma, middle, pred=middle - sigma, keep_pred=1.0, ends=0.0))
        steps.append(SamplerStep(middle, following, pred=following - sigma, history=(sigma - middle, 0.0, 0.0)))
    return steps


def _flow_split(sigma: float, following: float) -> tuple[float, float, float]:
    """An ancestral step of a flow: it goes down to `down`, is scaled, and gets noise. Returns down, scale, noise."""
    down = following**2 / sigma
    scale = (1 - following) / (1 - down)
    return down, scale, math.sqrt(max(0.0, following**2 - (down * scale) ** 2))


def euler_ancestral(sigmas: np.ndarray, shift: float) -> list[SamplerStep]:
    """Euler to less than sigma', and noise back up to it, as a flow mixes them."""
    del shift
    steps: list[SamplerStep] = []
    for sigma, following in _steps(sigmas):
        if following == 0.0:
            steps.append(_to_clean(sigma))
            continue
        down, scale, noise = _flow_split(sigma, following)
        clean = (1 - down / sigma) * scale
        x = down / sigma * scale
        steps.append(SamplerStep(sigma, following, x=x + clean, pred=-sigma * clean, noise=noise))
    return steps


def lcm(sigmas: np.ndarray, shift: float) -> list[SamplerStep]:
    """D under new noise (Luo et al. 2023, latent consistency models)."""
    del shift
    return [
        SamplerStep(sigma, following, x=1 - following, pred=-sigma * (1 - following), noise=following)
        for sigma, following in _steps(sigmas)
    ]


def gradient_estimation(sigmas: np.ndarray, shift: float) -> list[SamplerStep]:
    """x + (2 v - v of the step before) (sigma' - sigma) (Permenter and Yuan 2023, gamma 2)."""
    del shift
    steps: list[SamplerStep] = []
    for i, (sigma, following) in enumerate(_steps(sigmas)):
        delta = following - sigma
        if following == 0.0:
            steps.append(_to_clean(sigma))
        elif i == 0:
            steps.append(SamplerStep(sigma, following, pred=delta, keep_pred=1.0))
        else:
            steps.append(SamplerStep(sigma, following, pred=2 * delta, history=(-delta, 0.0, 0.0), keep_pred=1.0))
    return steps


def dpmpp_2m(sigmas: np.ndarray, shift: float) -> list[SamplerStep]:
    """DPM-Solver++(2M) (Lu et al. 2022) in ln sigma, not in lambda: ComfyUI's for every model."""
    del shift
    steps: list[SamplerStep] = []
    kept = _CleanHistory(1)
    before = 0.0
    for i, (sigma, following) in enumerate(_steps(sigmas)):
        if following == 0.0:
            steps.append(_to_clean(sigma))
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
    """DPM-Solver++(2M) in lambda, as diffusers' DPMSolverMultistepScheduler has it for flow models (midpoint).

    Of first order at the first step, after a step from pure noise, and at the last.
    """
    del shift
    steps: list[SamplerStep] = []
    before = -math.inf  # lambda of the last step's start
    for i, (sigma, following) in enumerate(_steps(sigmas)):
        here, there = _half_log_snr(sigma), _half_log_snr(following)
        # alpha_t (1 - exp(-h)), the weight of the clean image; h is infinite from pure noise and to a clean image.
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


def _lambda(sigma: float) -> float:
    """lambda in float32, as ComfyUI has it: a Brownian path's noise is another for a middle that rounds otherwise.

    The logarithm itself is in float64, so that it does not depend on the machine.
    """
    value = np.float32(sigma)
    return float(np.float32(-math.log(float(value / (np.float32(1) - value)))))


def _middle(sigma: float, following: float) -> float:
    """The sigma half way in lambda, in float32 for the same reason."""
    here, there = np.float32(_lambda(sigma)), np.float32(_lambda(following))
    middle = there - (there - here) * np.float32(0.5)
    return float(np.float32(1) / (np.float32(1) + np.float32(math.exp(float(middle)))))


def _below_one(sigmas: np.ndarray, shift: float) -> np.ndarray:
    """A first sigma of 1, whose lambda is infinite, becomes that of timestep 0.9999."""
    if sigmas[0] < 1:
        return sigmas
    t = np.float32(0.9999)
    near = np.float32(shift) * t / (np.float32(1) + np.float32(shift - 1) * t)
    return np.append(near, sigmas[1:])


def dpmpp_2m_sde(sigmas: np.ndarray, shift: float) -> list[SamplerStep]:
    """SDE-DPM-Solver++(2M), midpoint, in lambda, eta 1."""
    steps: list[SamplerStep] = []
    kept = _CleanHistory(1)
    before = None  # the last step in lambda
    for sigma, following in _steps(_below_one(sigmas, shift)):
        if following == 0.0:
            steps.append(_to_clean(sigma))
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
    """SDE-DPM-Solver++(3M) in lambda, eta 1: second and third order from the D of the last two steps."""
    steps: list[SamplerStep] = []
    kept = _CleanHistory(2)
    widths: list[float] = []  # the steps in lambda, the last one first
    for sigma, following in _steps(_below_one(sigmas, shift)):
        if following == 0.0:
            steps.append(_to_clean(sigma))
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


def _ancestral(sigma: float, following: float) -> tuple[float, float]:
    """How far an ancestral step goes down, and the noise that brings it up again, where noise is added, not mixed."""
    up = min(following, following * math.sqrt(max(0.0, 1 - (following / sigma) ** 2)))
    return math.sqrt(following**2 - up**2), up


def dpmpp_sde(sigmas: np.ndarray, shift: float) -> list[SamplerStep]:
    """DPM-Solver++ SDE of two stages, r 1/2, eta 1: to the middle in lambda, and the whole step with the D there."""
    steps: list[SamplerStep] = []
    for sigma, following in _steps(_below_one(sigmas, shift)):
        if following == 0.0:
            steps.append(_to_clean(sigma))
            continue
        middle = _middle(sigma, following)

        def to(end: float, sigma: float = sigma) -> tuple[float, float, float]:
            """Weights of x, D and noise on the way to `end`; the split is that of sigma / (1 - sigma)."""
            start, stop = sigma / (1 - sigma), end / (1 - end)
            down, up = _ancestral(start, stop)
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


def _exponential_2(sigma: float, end: float, offset: float) -> tuple[float, float, float]:
    """Weights of x, D and the D before for the second-order exponential step in ln sigma; `offset` is c2."""
    h = math.log(sigma / end)
    first = -math.expm1(-h) / h
    second = (1 - first) / h
    return math.exp(-h), h * (first - second / offset), h * second / offset


def res_multistep(sigmas: np.ndarray, shift: float) -> list[SamplerStep]:
    """RES (Zhang et al. 2023, refined exponential solver), two steps, in ln sigma; first and last step Euler's."""
    del shift
    steps: list[SamplerStep] = []
    kept = _CleanHistory(1)
    before = None
    for sigma, following in _steps(sigmas):
        if following == 0.0:
            steps.append(_to_clean(sigma))
            continue
        if before is None:
            ratio = following / sigma
            steps.append(kept.row(sigma, following, x=ratio, clean=(1 - ratio,)))
        else:
            offset = -math.log(before / sigma) / math.log(sigma / following)
            x, clean, last = _exponential_2(sigma, following, offset)
            steps.append(kept.row(sigma, following, x=x, clean=(clean, last)))
        before = sigma
    return steps


def res_multistep_ancestral(sigmas: np.ndarray, shift: float) -> list[SamplerStep]:
    """The same down to less than sigma', and noise added; the split is the old one, not the flow's."""
    del shift
    steps: list[SamplerStep] = []
    kept = _CleanHistory(1)
    before = None  # sigma and `down` of the last step
    for sigma, following in _steps(sigmas):
        down, up = _ancestral(sigma, following)
        if down == 0.0:
            steps.append(SamplerStep(sigma, following, x=1.0, pred=-sigma, noise=up, keep_x=1.0, keep_pred=-sigma))
        elif before is None:
            ratio = down / sigma
            steps.append(kept.row(sigma, following, x=ratio, clean=(1 - ratio,), noise=up))
        else:
            offset = -math.log(before[0] / before[1]) / math.log(sigma / down)
            x, clean, last = _exponential_2(sigma, down, offset)
            steps.append(kept.row(sigma, following, x=x, clean=(clean, last), noise=up))
        before = (sigma, down)
    return steps


def er_sde(sigmas: np.ndarray, shift: float) -> list[SamplerStep]:
    """ER-SDE-Solver-3 (Cui et al. 2023) with the noise scale e (exp(e^0.3) + 10) of e = sigma / (1 - sigma)."""
    steps: list[SamplerStep] = []
    kept = _CleanHistory(2)
    past: list[float] = []  # e of the last steps, the last one first

    def scale(e: np.ndarray | float) -> np.ndarray:
        return e * (np.exp(np.power(e, 0.3)) + 10)

    for sigma, following in _steps(_below_one(sigmas, shift)):
        if following == 0.0:
            steps.append(_to_clean(sigma))
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

    z' = x * z + base * D0 + sum_k weight_k * (D_k - D0) / r_k + rest * (D' - D0), D0 the step's first D, D_k those
    before it, D' the one at its end, in the corrector alone.
    """

    def __init__(self, sigmas: Sequence[float], order: int, bh2: bool) -> None:
        """`sigmas`: the step's end, its beginning, and those before it, `order + 1` of them."""
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
        """The differences' weights as those of D0, D1, …"""
        shares = [weight / ratio for weight, ratio in zip(weights, self.ratios, strict=True)]
        return [-sum(shares), *shares]


def _uni_terms(sigma: float) -> tuple[float, float, float]:
    """alpha, spread and lambda of z, in float32 as ComfyUI has them: 1 - alpha^2 of small sigmas is rough, and shows.

    The logarithm and the exponential are in float64 and rounded: but for a last place, they are so in float32.
    """
    square = np.float32(sigma) * np.float32(sigma) + np.float32(1)
    log_alpha = np.float32(0.5) * np.float32(math.log(float(np.float32(1) / square)))
    rest = np.float32(1) - np.float32(math.exp(float(np.float32(2) * log_alpha)))
    spread = np.sqrt(rest)
    log_spread = np.float32(0.5) * np.float32(math.log(float(rest)))
    return math.exp(float(log_alpha)), float(spread), float(log_alpha - log_spread)


def _uni_pc(sigmas: np.ndarray, *, bh2: bool) -> list[SamplerStep]:
    """UniPC of order 3, or less near both ends, as ComfyUI runs it.

    The last 0 becomes 0.001, and the result is divided by 1 - 0.001. The corrector is no evaluation of its own: the one
    at a step's end corrects that end, and begins the next step. Both are one row, because the predictor's x is there.
    """
    whole = [float(sigma) for sigma in sigmas.astype(np.float64)]
    path = [*whole[:-1], float(np.float32(0.001))] if whole[-1] == 0 else whole
    count = len(path) - 1
    steps: list[SamplerStep] = []
    kept = _CleanHistory(HISTORY)
    last: _UniStep | None = None
    for i in range(count):
        order = max(1, min(3, count - 1, i + 1, count - i))
        sigma, following = path[i], path[i + 1]
        step = _UniStep([following, *path[i::-1]][: order + 1], order, bh2)
        grown, grown_next = math.hypot(1, sigma), math.hypot(1, following)
        clean = [0.0] * (HISTORY + 1)  # of D0 here, D1, D2, D3; of z until the end
        if last is not None:
            # The corrected beginning less the predicted one: only the weights of D differ.
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
