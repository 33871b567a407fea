"""Layers of the export modules; each layer says how its weights are made from the checkpoint's tensors."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ..precision import Precision


def _only(parts: Sequence[Tensor]) -> Tensor:
    return parts[0]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts))


@dataclasses.dataclass(frozen=True)
class Source:
    """Recipe for one stored tensor.

    Attributes:
        names: the checkpoint's tensors, relative to the parent of the module that owns the stored tensor.
        shapes: expected shape of each.
        assemble: makes the stored tensor from them; without names it returns a constant.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    assemble: Callable[[Sequence[Tensor]], Tensor] = _only


def weight_sources(module: nn.Module) -> Iterator[tuple[str, Tensor, Source]]:
    """Yields (name, meta tensor of the stored shape and dtype, source with full names) per tensor of a module."""
    for name, tensor in module.state_dict(keep_vars=True).items():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        source = getattr(owner, "sources", {}).get(leaf)
        if source is None:
            yield name, tensor, Source((name,), (tuple(tensor.shape),))
        else:
            own, _, last = path.rpartition(".")
            prefix = own + "." if own else ""
            names = tuple(prefix + part.replace("{}", last) for part in source.names)
            yield name, tensor, dataclasses.replace(source, names=names)


def half_split(rows: Tensor, head_dim: int) -> Tensor:
    """Reorders each head's rows from RoPE's pairs (0, 1), (2, 3), … to (0, head_dim/2), (1, head_dim/2 + 1), …

    Queries and keys get the same order, so their dot products stay the same. Rotating halves needs no strided access.
    """
    heads = rows.unflatten(0, (-1, head_dim // 2, 2))
    return heads.transpose(1, 2).reshape(rows.shape)


class Part(NamedTuple):
    """A matrix of the checkpoint that is stored side by side with others of the same input.

    Attributes:
        name: the checkpoint's layer, relative to the parent of the `Linear`; `{}` is the `Linear`'s own name.
        size: output features.
        head_dim: rows are stored in the order of `half_split` for heads of this width; 0 keeps their order.
    """

    name: str
    size: int
    head_dim: int = 0


class Linear(nn.Module):
    """A matrix product whose weight is stored as [in, out], so that the graph holds no Transpose.

    With a bias the result is fp32, otherwise it has the compute dtype.

    Args:
        in_features: input width.
        outputs: output width, or the matrices of the checkpoint that are stored as one.
        precision: gives the storage and the compute dtype.
        bias: whether the checkpoint has a bias.
        fp32: compute in fp32 in every precision.
        scale: a power of two that keeps an input without a norm in fp16's range. The input is multiplied by it and the
            fp32 result is divided by it, which needs a bias.
    """

    def __init__(
        self,
        in_features: int,
        outputs: int | tuple[Part, ...],
        precision: Precision,
        *,
        bias: bool = False,
        fp32: bool = False,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.parts = (Part("{}", outputs),) if isinstance(outputs, int) else outputs
        out_features = sum(part.size for part in self.parts)
        self.compute = torch.float32 if fp32 else precision.compute
        self.weight = nn.Parameter(torch.empty(in_features, out_features, dtype=precision.storage), requires_grad=False)

        def assemble(matrices: Sequence[Tensor]) -> Tensor:
            pairs = zip(matrices, self.parts, strict=True)
            rows = [half_split(matrix, part.head_dim) if part.head_dim else matrix for matrix, part in pairs]
            return (rows[0] if len(rows) == 1 else _joined(rows)).t()

        self.sources = {
            "weight": Source(
                tuple(f"{part.name}.weight" for part in self.parts),
                tuple((part.size, in_features) for part in self.parts),
                assemble,
            )
        }
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False)
            self.sources["bias"] = Source(
                tuple(f"{part.name}.bias" for part in self.parts), tuple((part.size,) for part in self.parts), _joined
            )

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if self.scale != 1.0:
            x = x * self.scale
        y = torch.matmul(x.to(self.compute), self.weight.to(self.compute))
        if self.bias is None:
            return y
        y = y.float()
        return (y if self.scale == 1.0 else y * (1.0 / self.scale)) + self.bias


class RMSNorm(nn.Module):
    """RMSNorm in fp32 of an input that was multiplied by `scale`; eps is scaled by its square."""

    def __init__(
        self, size: int, eps: float, scale: float = 1.0, reorder: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.eps = eps * scale * scale
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        if reorder is not None:
            self.sources = {"weight": Source(("{}.weight",), ((size,),), lambda parts: reorder(parts[0]))}

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size], fp32."""
        x = x.float()
        # ONNX Runtime and TensorRT fuse a division by a square root into one kernel, but not rsqrt.
        return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


def _constant(value: Tensor, _: Sequence[Tensor]) -> Tensor:
    return value


class Constants(nn.Module):
    """Named tensors that are computed at export and stored with the weights.

    Their values are computed on the CPU, also for modules on the meta device.
    """

    def __init__(self, **tensors: Tensor) -> None:
        super().__init__()
        self.sources = {}
        for name, value in tensors.items():
            self.register_buffer(name, torch.empty(value.shape))
            self.sources[name] = Source((), (), functools.partial(_constant, value))

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Tensor: ...


def swiglu(gate: Tensor, up: Tensor, precision: Precision) -> Tensor:
    """SiLU(gate) * up; both factors are scaled so that their product stays in fp16's range."""
    gate = torch.nn.functional.silu(gate)
    if precision.gate_scale != 1.0:
        gate, up = gate * precision.gate_scale, up * precision.up_scale
    return gate * up


def attention(q: Tensor, k: Tensor, v: Tensor, precision: Precision, mask: Tensor | None = None) -> Tensor:
    """Softmax(q kᵀ / sqrt(head_dim)) v with an fp32 softmax, in the form that TensorRT fuses.

    Shapes: q [batch, heads, queries, head_dim]; k and v [batch, heads, keys, head_dim]; the mask is added to scores
    [batch, heads, queries, keys]. TensorRT does not fuse tensors of five dimensions.
    """
    compute = precision.compute
    q = (q * (1.0 / math.sqrt(q.shape[-1]))).to(compute)
    scores = torch.matmul(q, k.to(compute).transpose(-1, -2)).float()
    if mask is not None:
        scores = scores + mask
    probabilities = torch.softmax(scores, dim=-1).to(compute)
    if precision.wide_values:
        return torch.matmul(probabilities.float(), v.float()).to(compute)
    return torch.matmul(probabilities, v)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of halves: x [batch, tokens, heads, head_dim]; cos and sin [tokens, 1, head_dim], sin signed."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((second, first), dim=-1) * sin


def signed_halves(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [tokens, head_dim / 2] -> arguments of `rotate`, [tokens, 1, head_dim] each."""
    return torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((-sin, sin), -1).unsqueeze(1)
