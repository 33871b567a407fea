"""Kinds of strange input to the C++ of `_core`, for runs under the sanitizers too: no file and no other library."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from fuzzing import STRANGE, Kind, check, kind

from zimage_rt import _core
from zimage_rt.backends.base import Conditioning, Guidance, Inpaint, SampleJob
from zimage_rt.sampling.samplers import SAMPLERS, sampler_table, step_noise
from zimage_rt.sampling.schedules import SCHEDULES, schedule_sigmas

SHAPES = (
    (1, 16, 4, 4),
    (2, 16, 4, 6),
    (1, 4, 2, 2),
    (0, 16, 4, 4),
    (1, 16, 0, 4),
    (3,),
    (),
    (1, 2, 3),
    (1, 1, 1, 1, 1),
)


def array(rng: random.Random, shape: tuple[int, ...] | None = None) -> Any:
    """An array of the usual type and of some other; contiguous, or not; or no array."""
    if rng.random() < 0.05:
        return rng.choice(STRANGE)
    values = np.random.default_rng(rng.randrange(2**32)).standard_normal(shape or rng.choice(SHAPES))
    values = values.astype(rng.choice(("float32",) * 8 + ("float64", "int32", "float16", "uint8")))
    if rng.random() < 0.1 and values.size:
        values.flat[rng.randrange(values.size)] = rng.choice((0, 1)) if values.dtype.kind in "iu" else np.nan
    if rng.random() < 0.1 and values.ndim:
        values = values[::-1]
    return values


@kind("native call")
class NativeCall(Kind):
    """Functions of `_core` with arguments of any shape, type and size."""

    # What pybind11 and the bindings raise; `Engine` has checked its arguments before.
    errors = (ValueError, TypeError, MemoryError, OverflowError, RuntimeError, AttributeError)
    longest = 1 << 30  # pybind11 writes all of a wrong argument

    def run(self, rng: random.Random) -> None:
        rng.choice((self._randn, self._paste, self._brownian, self._sample, self._sample))(rng)

    def _randn(self, rng: random.Random) -> None:
        shape = [rng.choice((0, 1, 2, 5, 16, 17)) for _ in range(rng.choice((0, 1, 2, 4)))]
        seed = rng.choice((0, 7, 2**32, 2**64 - 1, rng.choice(STRANGE)))
        noise = _core.randn(seed, shape) if rng.random() < 0.9 else _core.randn(seed, rng.choice(STRANGE))
        check(bool(np.isfinite(noise).all()), "noise that is not finite")
        stream = _core.stream_noise([seed, 3], rng.choice((0, 1, 3)), shape)
        check(stream.shape[2:] == tuple(shape), "noise of another shape")

    def _paste(self, rng: random.Random) -> None:
        shapes = (
            rng.choice(((1, 6, 5, 3), (2, 6, 5, 3), (6, 5, 3))),
            rng.choice(((6, 5, 3), (5, 6, 3), (6, 5))),
            rng.choice(((6, 5), (5, 6), (30,))),
        )
        numbers = np.random.default_rng(rng.randrange(99))
        drawn, original, mask = (numbers.integers(0, 256, shape, np.uint8) for shape in shapes)
        if rng.random() < 0.2:
            mask = rng.choice((mask[::-1], mask.astype(np.float32), array(rng), np.zeros((6, 5), np.uint8)))
        pasted = _core.paste(drawn, original, mask)
        check(
            bool((np.asarray(pasted)[:, np.asarray(mask) == 0] == original[np.asarray(mask) == 0]).all()),
            "other pixels",
        )

    def _brownian(self, rng: random.Random) -> None:
        low, high = rng.choice(((0.0, 1.0), (0.1, 14.6), (1.0, 1.0), (2.0, 1.0), (float("nan"), 1.0), (0.0, 1e308)))
        intervals = [(rng.random() * 2, rng.random() * 2) for _ in range(rng.choice((0, 1, 3)))]
        _core.brownian_noise([1, 2**64 - 1], low, high, intervals, [2, rng.choice((0, 1, 3))])

    def _sample(self, rng: random.Random) -> None:
        name = rng.choice(sorted(SAMPLERS))
        sigmas = schedule_sigmas(rng.choice(sorted(SCHEDULES)), rng.randint(1, 9), 3.0)
        steps = sampler_table(name, sigmas, 3.0)
        shape = rng.choice(((1, 16, 4, 4), (2, 16, 4, 6)))
        noise = step_noise(name, sigmas, 3.0, [1] * shape[0], shape[1:], joint=False)
        latents = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        fields: dict[str, Any] = {
            "steps": steps,
            "latents": latents,
            "scales": np.zeros((len(steps), shape[0]), np.float32),
            "normalization": 0.0,
            "step_noise": noise,
        }
        plain = True
        if rng.random() < 0.3:
            parts = {"mask": np.ones((shape[0], 1, *shape[2:]), np.float32), "image": latents.copy()}
            parts["noise"] = latents.copy()
            if rng.random() < 0.3:
                parts[rng.choice(sorted(parts))] = rng.choice((array(rng), None, rng.choice(STRANGE)))
                plain = False
            fields["inpaint"] = Inpaint(**parts)
        if rng.random() < 0.6:
            key = rng.choice(sorted(fields))
            fields[key] = rng.choice((array(rng), None, rng.choice(STRANGE), steps[: len(steps) // 2], steps * np.nan))
        guidance = Guidance(fields.pop("scales"), fields.pop("normalization"))
        job = SampleJob(conditioning=Conditioning(()), guidance=guidance, **fields)
        _core.sample(lambda x, t, guided, out: out.__setitem__(..., 0.1), job)
        plain = plain and fields["steps"] is steps and fields["latents"] is latents
        check(not plain or bool(np.isfinite(latents).all()), "latents not finite")
