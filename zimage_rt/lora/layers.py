"""The changes of weights in LoRA files: low-rank products, LoKr, LoHa, DoRA and full differences."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

# A LoKr or LoHa up to this rank is stored as a low-rank product, which every backend adds as cheaply as a plain LoRA; a
# larger one is stored as in its file and expanded, layer by layer, when it is applied.
MAX_FACTOR_RANK = 128


@dataclasses.dataclass(frozen=True, eq=False)
class LoraLayer:
    """A layer whose change is a low-rank product.

    Attributes:
        name: the file's name for the layer, which precedes `.lora_A.weight`.
        down: float32 `[rank, in]`.
        up: float32 `[out, rank]`, multiplied by the scale.
        keys: the file's keys, for messages.
        magnitude: DoRA's, float32: norms of the changed weight's rows, `[out, 1]`, or of its columns, `[1, in]`.
    """

    name: str
    down: np.ndarray
    up: np.ndarray
    keys: tuple[str, ...]
    magnitude: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        return len(self.up), self.down.shape[1]

    def delta(self) -> np.ndarray:
        """The change, float32 `[out, in]`."""
        return self.up @ self.down


@dataclasses.dataclass(frozen=True, eq=False)
class WholeLayer:
    """A layer whose change is a full matrix.

    Attributes:
        name, keys, magnitude: as in `LoraLayer`.
        shape: `(out, in)`.
        delta: computes the change, float32 `[out, in]`.
        replaces: whether `delta` computes the new weight instead of its change.
    """

    name: str
    shape: tuple[int, int]
    delta: Callable[[], np.ndarray]
    keys: tuple[str, ...]
    magnitude: np.ndarray | None = None
    replaces: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class VectorChange:
    """A change of a layer's bias or a norm's weight.

    Attributes:
        name, keys, replaces: as in `WholeLayer`.
        part: `weight` or `bias`.
        values: float32 `[size]`.
    """

    name: str
    part: str
    values: np.ndarray
    keys: tuple[str, ...]
    replaces: bool = False


Layer = LoraLayer | WholeLayer | VectorChange


@dataclasses.dataclass(frozen=True, eq=False)
class Factors:
    """A matrix as stored in a file: `a @ b`, or `whole`.

    Attributes:
        whole: float32 `[rows, columns]`, or None.
        a, b: float32 `[rows, rank]` and `[rank, columns]`, or None.
    """

    whole: np.ndarray | None = None
    a: np.ndarray | None = None
    b: np.ndarray | None = None

    @property
    def rank(self) -> int | None:
        """The rank of the product; None for a whole matrix."""
        return None if self.b is None else len(self.b)

    @property
    def shape(self) -> tuple[int, int]:
        """`(rows, columns)`."""
        a, b = self.pair()
        return len(a), b.shape[1]

    def pair(self) -> tuple[np.ndarray, np.ndarray]:
        """Two factors of the matrix; for a whole matrix one of them is the identity of its shorter side."""
        if self.a is not None and self.b is not None:
            return self.a, self.b
        assert self.whole is not None
        rows, columns = self.whole.shape
        if rows < columns:
            return np.eye(rows, dtype=np.float32), self.whole
        return self.whole, np.eye(columns, dtype=np.float32)

    def matrix(self) -> np.ndarray:
        """float32 `[rows, columns]`."""
        if self.whole is not None:
            return self.whole
        a, b = self.pair()
        return a @ b


def lokr(name: str, w1: Factors, w2: Factors, scale: float, keys: tuple[str, ...]) -> LoraLayer | WholeLayer:
    """The layer of a LoKr: the change is `scale * kron(w1, w2)` (LyCORIS, `lycoris/modules/lokr.py`).

    The Kronecker product of two products is the product of two Kronecker products, so its rank is the ranks' product.
    """
    (a1, b1), (a2, b2) = w1.pair(), w2.pair()
    shape = (len(a1) * len(a2), b1.shape[1] * b2.shape[1])
    if _is_thin(len(b1) * len(b2), shape):
        return LoraLayer(name, np.kron(b1, b2), np.kron(a1, a2) * np.float32(scale), keys)
    return WholeLayer(name, shape, lambda: np.kron(w1.matrix() * np.float32(scale), w2.matrix()), keys)


def loha(name: str, w1: Factors, w2: Factors, scale: float, keys: tuple[str, ...]) -> LoraLayer | WholeLayer:
    """The layer of a LoHa: the change is `scale * w1 * w2`, elementwise (LyCORIS, `lycoris/modules/loha.py`).

    Its rank is at most the product of the ranks: its factors are the products of all pairs of columns and of rows.
    """
    (a1, b1), (a2, b2) = w1.pair(), w2.pair()
    shape = (len(a1), b1.shape[1])
    if _is_thin(len(b1) * len(b2), shape):
        down = (b1[:, None] * b2[None]).reshape(-1, shape[1])
        up = (a1[:, :, None] * a2[:, None]).reshape(shape[0], -1)
        return LoraLayer(name, down, up * np.float32(scale), keys)
    return WholeLayer(name, shape, lambda: w1.matrix() * np.float32(scale) * w2.matrix(), keys)


def _is_thin(rank: int, shape: tuple[int, int]) -> bool:
    return rank <= MAX_FACTOR_RANK and rank < min(shape)


def same_product(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray], tolerance: float) -> bool:
    """Whether both `down.T @ up` are equal within `tolerance` times the first one's Frobenius norm.

    The products are not computed: their scalar products are sums over the ranks.
    """

    def dot(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> float:
        downs = a[0].astype(np.float64) @ b[0].T.astype(np.float64)
        ups = a[1].astype(np.float64) @ b[1].T.astype(np.float64)
        return float((downs * ups).sum())

    size = dot(one, one)
    return size - 2 * dot(one, other) + dot(other, other) <= tolerance**2 * size
