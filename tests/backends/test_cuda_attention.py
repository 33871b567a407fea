"""Flash attention on the GPU against a float64 reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cuda_reference import TOLERANCE, cast, relative_error, require_kernels, to_float

pytestmark = pytest.mark.gpu
cuda_kernels = require_kernels()

DTYPES = ["float16", "bfloat16"]
# The kernel rounds the weights of the softmax to 16 bits as well as the result: two errors of one size that know
# nothing of each other, so 1.4 of one, for which TOLERANCE has room. A row alone is no average: its worst is some
# deviations from it, and one that went wrong is off by all of itself.
SCALE_OF_ROW_TOLERANCE = 4.0


@pytest.fixture(scope="module")
def kernels() -> Any:
    return cuda_kernels


def reference(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, causal: bool) -> np.ndarray:
    """q [B, Sq, Hq, D] and k, v [B, Sk, Hkv, D] as the kernel takes them -> [B, Sq, Hq, D] in float64."""
    q, k, v = to_float(q), to_float(k), to_float(v)
    group = q.shape[2] // k.shape[2]
    out = np.empty_like(q)
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        scores = scale * (q[b, :, h] @ k[b, :, h // group].T)  # [Sq, Sk]
        if causal:
            scores[np.triu_indices(len(scores), 1)] = -np.inf
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[b, :, h] = weights @ v[b, :, h // group] / weights.sum(axis=1, keepdims=True)
    return out


def assert_close(out: np.ndarray, expected: np.ndarray, dtype: str) -> None:
    assert relative_error(out, expected) <= TOLERANCE[dtype]
    error = np.linalg.norm(to_float(out) - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert error.max() <= SCALE_OF_ROW_TOLERANCE * TOLERANCE[dtype], np.unravel_index(np.argmax(error), error.shape)


def random_qkv(
    dtype: str, batch: int, queries: int, keys: int, heads: int, kv_heads: int, head_dim: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng()
    q = rng.standard_normal((batch, queries, heads, head_dim))
    k, v = (rng.standard_normal((batch, keys, kv_heads, head_dim)) for _ in range(2))
    return cast(q, dtype), cast(k, dtype), cast(v, dtype)


@pytest.mark.parametrize("query_tile", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 31, 33, 64, 65, 200, 512])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths(kernels: Any, dtype: str, head_dim: int, length: int, causal: bool, query_tile: int) -> None:
    q, k, v = random_qkv(dtype, 2, length, length, 4, 2, head_dim)
    scale = head_dim**-0.5
    out = kernels.flash_attention(q, k, v, scale, causal, query_tile)
    assert out.shape == q.shape
    assert out.dtype == q.dtype
    assert_close(out, reference(q, k, v, scale, causal), dtype)


@pytest.mark.parametrize("query_tile", [64, 128])
@pytest.mark.parametrize("queries, keys", [(1, 200), (200, 1), (65, 33), (33, 130), (129, 191)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_and_keys_differ_in_number(kernels: Any, dtype: str, queries: int, keys: int, query_tile: int) -> None:
    q, k, v = random_qkv(dtype, 2, queries, keys, 3, 3, 128)
    out = kernels.flash_attention(q, k, v, 0.1, False, query_tile)
    assert_close(out, reference(q, k, v, 0.1, False), dtype)


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (6, 6), (8, 2), (6, 2), (5, 1)])
@pytest.mark.parametrize("causal", [False, True])
def test_heads_in_groups(kernels: Any, heads: int, kv_heads: int, causal: bool) -> None:
    q, k, v = random_qkv("bfloat16", 1, 100, 100, heads, kv_heads, 64)
    out = kernels.flash_attention(q, k, v, 0.125, causal)
    assert_close(out, reference(q, k, v, 0.125, causal), "bfloat16")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim, heads, kv_heads", [(64, 4, 2), (128, 3, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_strides(kernels: Any, dtype: str, head_dim: int, heads: int, kv_heads: int, causal: bool) -> None:
    batch, length = 3, 77
    rng = np.random.default_rng()
    qkv = cast(rng.standard_normal((batch, length, (heads + 2 * kv_heads) * head_dim)), dtype)
    parts = qkv.reshape(batch, length, -1, head_dim)
    q, k, v = np.split(parts, [heads, heads + kv_heads], axis=2)
    for query_tile in (64, 128):
        out = kernels.flash_attention_packed(qkv, heads, kv_heads, 0.1, causal, query_tile)
        assert_close(out[:, :-1, :-1], reference(q, k, v, 0.1, causal), dtype)
        # The token and the head that are not part of the output keep the bits they had.
        assert (out[:, -1].view(np.uint16) == 0xFFFF).all()
        assert (out[:, :, -1].view(np.uint16) == 0xFFFF).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal, length", [(False, 4224), (True, 1500)])
def test_long(kernels: Any, dtype: str, causal: bool, length: int) -> None:
    q, k, v = random_qkv(dtype, 1, length, length, 2, 1, 128)
    for query_tile in (0, 64, 128):
        out = kernels.flash_attention(q, k, v, 128**-0.5, causal, query_tile)
        assert_close(out, reference(q, k, v, 128**-0.5, causal), dtype)


@pytest.mark.parametrize("query_tile", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_peaked(kernels: Any, dtype: str, causal: bool, query_tile: int) -> None:
    # Logits of some hundreds: nearly all the weight is on one key, as in trained models.
    q, k, v = random_qkv(dtype, 1, 300, 300, 2, 2, 128)
    out = kernels.flash_attention(q, k, v, 10.0, causal, query_tile)
    assert_close(out, reference(q, k, v, 10.0, causal), dtype)


def keys_with_logits(q_direction: np.ndarray, logits: np.ndarray, head_dim: int) -> np.ndarray:
    """k [1, keys, 1, head_dim] whose product with `q_direction` (length sqrt(head_dim)) is `logits`, and noise."""
    noise = np.random.default_rng().standard_normal((len(logits), head_dim)) * 0.5
    return (logits[:, None] * q_direction / head_dim + noise)[None, :, None, :]


@pytest.mark.parametrize("query_tile", [64, 128])
@pytest.mark.parametrize("order", ["first tile negligible", "later tiles negligible", "rising"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_running_maximum(kernels: Any, dtype: str, order: str, query_tile: int) -> None:
    head_dim, keys = 128, 250
    rng = np.random.default_rng()
    direction = np.sign(rng.standard_normal(head_dim))
    logits = np.zeros(keys)
    if order == "first tile negligible":
        logits[:64] = -10_000.0
    elif order == "later tiles negligible":
        logits[64:] = -10_000.0
    else:  # every tile brings a new maximum, and the ones before still count
        logits = np.linspace(-20.0, 0.0, keys)
    q = direction + 0.1 * rng.standard_normal((1, 70, 1, head_dim))
    k = keys_with_logits(direction, logits, head_dim)
    # What a wrong correction of the sums would let through is large.
    v = rng.standard_normal((1, keys, 1, head_dim)) * np.where(logits < -5_000, 100.0, 1.0)[None, :, None, None]
    q, k, v = cast(q, dtype), cast(k, dtype), cast(v, dtype)
    out = kernels.flash_attention(q, k, v, 1.0, False, query_tile)
    assert_close(out, reference(q, k, v, 1.0, False), dtype)


def test_every_run_gives_the_same_bytes(kernels: Any) -> None:
    q, k, v = random_qkv("bfloat16", 1, 333, 333, 6, 3, 128)
    for query_tile in (64, 128):
        runs = [kernels.flash_attention(q, k, v, 0.1, False, query_tile).tobytes() for _ in range(5)]
        assert len(set(runs)) == 1


def test_wrong_arguments(kernels: Any) -> None:
    q, k, v = random_qkv("float16", 1, 8, 8, 3, 2, 64)
    with pytest.raises(ValueError, match="kv_heads to divide"):
        kernels.flash_attention(q, k, v, 1.0)
    q, k, v = random_qkv("float16", 1, 8, 8, 2, 2, 96)
    with pytest.raises(ValueError, match="head_dim 64 or 128, got 96"):
        kernels.flash_attention(q, k, v, 1.0)
    q, k, v = random_qkv("float16", 1, 8, 9, 2, 2, 64)
    with pytest.raises(ValueError, match="as many keys as queries"):
        kernels.flash_attention(q, k, v, 1.0, True)
    with pytest.raises(ValueError, match="fp32"):
        kernels.flash_attention(*(x.astype(np.float32) for x in (q, k, v)), 1.0)
