"""The rows of a sampler: function evaluations with a linear update behind each.

The samplers themselves are in `deterministic.py` and `stochastic.py`.

Notation: x are the latents; v is the prediction with its sign flipped, so that dx/dsigma = v; D = x - sigma v is the
clean image. A step goes from sigma to sigma'. Flow models have x = (1 - sigma) image + sigma noise, and
lambda = ln((1 - sigma) / sigma).

Coefficients are computed in float64 from float32 sigmas; the loop runs in float32. docs/samplers.md describes the
samplers; tests/sampling/test_comfyui_samplers.py compares those of ComfyUI with its numbers.
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

    `csrc/cpu/sampler.h` has the same fields in the same order and describes them. `interval` is the
    increment of the Brownian path that is added; other noise has none.
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


class CleanHistory:
    """A ring buffer of the D of the last `size` steps: row i writes slot i % size, which holds the oldest."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._count = 0  # rows so far

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
        """The row of x' = x * latents + clean[0] * D + clean[1] * (D of the row before) + … + noise."""
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


def step_pairs(sigmas: np.ndarray) -> Iterator[tuple[float, float]]:
    """The sigma and the next sigma of each step, in float64."""
    return ((float(a), float(b)) for a, b in itertools.pairwise(sigmas.astype(np.float64)))


def to_clean(sigma: float) -> SamplerStep:
    """The last row, which ends at sigma 0 with D."""
    return SamplerStep(sigma, 0.0, pred=-sigma)


def exponential_2(sigma: float, end: float, offset: float) -> tuple[float, float, float]:
    """Weights of x, D and the previous D in the second-order exponential step in ln sigma; `offset` is c2."""
    h = math.log(sigma / end)
    first = -math.expm1(-h) / h
    second = (1 - first) / h
    return math.exp(-h), h * (first - second / offset), h * second / offset
