"""Quantiles of the symmetric beta distribution, for the beta schedules; SciPy would add 100 MB for this function."""

from __future__ import annotations

import math


def _cumulative(x: float, a: float) -> float:
    """The regularised incomplete beta function I_x(a, a), x <= 1/2, by its power series (DLMF 8.17.8)."""
    term = total = 1.0
    n = 0
    while term > 1e-17 * total:
        term *= x * (2 * a + n) / (a + 1 + n)
        total += term
        n += 1
    log_beta = 2 * math.lgamma(a) - math.lgamma(2 * a)
    return math.exp(a * math.log(x) + a * math.log1p(-x) - log_beta) * total / a


def beta_quantile(probability: float, a: float) -> float:
    """The x with P(X <= x) = probability for X ~ Beta(a, a), to about 1e-14."""
    if probability <= 0.0 or probability >= 1.0:
        return min(max(probability, 0.0), 1.0)
    if probability > 0.5:
        return 1.0 - beta_quantile(1.0 - probability, a)
    low, high = 0.0, 0.5
    for _ in range(60):  # bisection: 2^-60 is below the last place of a double
        middle = (low + high) / 2
        low, high = (middle, high) if _cumulative(middle, a) < probability else (low, middle)
    return (low + high) / 2
