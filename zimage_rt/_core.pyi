from collections.abc import Callable, Sequence

import numpy as np

cuda_skipped: str

def randn(seed: int, shape: Sequence[int]) -> np.ndarray: ...
def stream_noise(seeds: Sequence[int], draws: int, shape: Sequence[int]) -> np.ndarray: ...
def brownian_noise(
    seeds: Sequence[int], low: float, high: float, intervals: Sequence[tuple[float, float]], shape: Sequence[int]
) -> np.ndarray: ...
def paste(drawn: np.ndarray, original: np.ndarray, mask: np.ndarray) -> np.ndarray: ...
def sample(
    predict: Callable[[np.ndarray, float, bool, np.ndarray], None],
    steps: np.ndarray,
    latents: np.ndarray,
    guidance_scales: np.ndarray,
    cfg_normalization: float,
    *,
    mask: np.ndarray | None = None,
    image: np.ndarray | None = None,
    noise: np.ndarray | None = None,
    step_noise: np.ndarray | None = None,
    callback: Callable[[int, int, float, float, np.ndarray], bool] | None = None,
) -> bool: ...
