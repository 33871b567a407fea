from collections.abc import Callable, Sequence

import numpy as np

class Guidance:
    """Classifier-free guidance settings; csrc/include/zimage_rt/guidance.h has the formulas."""

    def __init__(self, scale: float = 0.0, truncation: float = 1.0, normalization: float = 0.0) -> None: ...
    @property
    def scale(self) -> float: ...
    @property
    def truncation(self) -> float: ...
    @property
    def normalization(self) -> float: ...
    def active(self, timestep: float) -> bool: ...

def randn(seed: int, shape: Sequence[int]) -> np.ndarray: ...
def flow_match_sigmas(num_inference_steps: int, shift: float) -> list[float]: ...
def apply_guidance(guidance: Guidance, positive: np.ndarray, negative: np.ndarray) -> np.ndarray: ...
def sample(
    predict: Callable[[np.ndarray, float, bool, np.ndarray], None],
    steps: np.ndarray,
    latents: np.ndarray,
    guidance: Guidance,
    *,
    mask: np.ndarray | None = None,
    image: np.ndarray | None = None,
    noise: np.ndarray | None = None,
    callback: Callable[[int, int, float, float, np.ndarray], bool] | None = None,
) -> bool: ...
