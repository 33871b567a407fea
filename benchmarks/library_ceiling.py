"""Lower bound of an evaluation's time: all matrix products by cuBLAS and all attentions by cuDNN, nothing else.

Element-wise kernels, embedders and modulation are left out. Each shape runs once per layer of the transformer. Calls
cycle through buffers of several times the L2 cache, so that weights are read from memory, as in the model.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from zimage_rt.benchmarks.timing import event_times
from zimage_rt.export.modeling.transformer import TransformerConfig

CACHE_TIMES = 3  # buffers of one kind are this many times the L2 cache
TRIES = 3  # passes in which each layout of a product is tried before the faster one is kept


@dataclasses.dataclass
class Shape:
    """An operation: its weight layouts, calls per evaluation, and the times of the chosen layout in milliseconds."""

    name: str
    flops: float
    count: int
    forms: dict[str, Callable[[], object]]
    times: list[float] = dataclasses.field(default_factory=list)


class LibraryCeiling:
    """A `timing.Run`: milliseconds of all products and attentions of an evaluation.

    Args:
        config: sizes of the transformer.
        image_tokens: tokens of the image, with padding.
        context_tokens: tokens of the context, which only the main layers have.
        batch: number of samples.
        dtype: dtype of the operands.
        device: `cuda`, or `cpu` to test the code.
    """

    def __init__(
        self,
        config: TransformerConfig,
        image_tokens: int,
        context_tokens: int,
        batch: int,
        dtype: torch.dtype,
        device: str,
    ) -> None:
        self._dtype, self._device = dtype, device
        cache = torch.cuda.get_device_properties(0).L2_cache_size if device != "cpu" else 1 << 20
        self._bytes = CACHE_TIMES * cache
        dim, hidden = config.dim, config.hidden_dim
        sizes = {"qkv": (dim, 3 * dim), "out": (dim, dim), "w13": (dim, 2 * hidden), "w2": (hidden, dim)}
        self.shapes: list[Shape] = []
        for tokens, count in (
            (image_tokens + context_tokens, config.n_layers),
            (image_tokens, config.n_refiner_layers),
        ):
            for name, (inputs, outputs) in sizes.items():
                self.shapes.append(self._product(name, batch * tokens, inputs, outputs, count))
            self.shapes.append(self._attention(batch, tokens, config, count))
        self._choose()

    def _buffers(self, *size: int) -> itertools.cycle[Tensor]:
        one = torch.empty(size, dtype=self._dtype, device=self._device)
        copies = max(2, -(-self._bytes // one.nbytes))
        return itertools.cycle([torch.randn_like(one) for _ in range(copies)])

    def _product(self, name: str, rows: int, inputs: int, outputs: int, count: int) -> Shape:
        x = self._buffers(rows, inputs)
        stored = self._buffers(outputs, inputs)
        result = torch.empty(rows, outputs, dtype=self._dtype, device=self._device)
        transposed = self._buffers(inputs, outputs)
        forms: dict[str, Callable[[], object]] = {
            "weight [out, in]": lambda: torch.matmul(next(x), next(stored).t(), out=result),
            "weight [in, out]": lambda: torch.matmul(next(x), next(transposed), out=result),
        }
        return Shape(f"{name} {rows}x{inputs}x{outputs}", 2.0 * rows * inputs * outputs, count, forms)

    def _attention(self, batch: int, tokens: int, config: TransformerConfig, count: int) -> Shape:
        heads, head_dim = config.n_heads, config.head_dim
        operands = self._buffers(3, batch, tokens, heads, head_dim)

        def run() -> object:
            q, k, v = next(operands).transpose(2, 3).unbind(0)
            if self._device == "cpu":
                return F.scaled_dot_product_attention(q, k, v)
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return F.scaled_dot_product_attention(q, k, v)

        flops = 4.0 * batch * heads * tokens * tokens * head_dim
        return Shape(f"attention {batch}x{heads}x{tokens}x{head_dim}", flops, count, {"cuDNN SDPA": run})

    def _time(self, shape: Shape, form: str) -> float:
        """Milliseconds of all `count` calls of a shape."""

        def burst() -> None:
            for _ in range(shape.count):
                shape.forms[form]()

        return event_times(burst, 1, self._device)[0]

    @torch.no_grad()
    def _choose(self) -> None:
        """Keeps the faster layout of each product."""
        for shape in self.shapes:
            for form in shape.forms:
                self._time(shape, form)
            tried = {form: statistics.median(self._time(shape, form) for _ in range(TRIES)) for form in shape.forms}
            best = min(tried, key=lambda form: tried[form])
            shape.forms = {best: shape.forms[best]}

    @torch.no_grad()
    def __call__(self, repeats: int) -> list[float]:
        """Milliseconds of an evaluation's operations, `repeats` times; also stores the times per shape."""
        totals = []
        for _ in range(repeats):
            total = 0.0
            for shape in self.shapes:
                shape.times.append(self._time(shape, next(iter(shape.forms))))
                total += shape.times[-1]
            totals.append(total)
        return totals

    def detail(self) -> dict[str, dict[str, float | int | str]]:
        """Layout, calls, median milliseconds and TFLOP/s per shape."""
        out: dict[str, dict[str, float | int | str]] = {}
        for shape in self.shapes:
            median = statistics.median(shape.times)
            rate = shape.flops * shape.count / median / 1e9
            form = next(iter(shape.forms))
            out[shape.name] = {"form": form, "count": shape.count, "ms": median, "tflops": round(rate, 1)}
        return out
