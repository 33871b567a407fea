"""Building blocks of the exported modules, and how each of their weights is made from the checkpoint's tensors."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..precision import Precision


def _only(parts: Sequence[Tensor]) -> Tensor:
    return parts[0]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts))


@dataclasses.dataclass(frozen=True)
class Source:
    """How one stored tensor is made.

    Attributes:
        names: the checkpoint's tensors, relative to the parent of the module that owns the stored tensor.
        shapes: what shape each must have.
        assemble: makes the stored tensor from them; with no names it computes a constant.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    assemble: Callable[[Sequence[Tensor]], Tensor] = _only


def weight_sources(module: nn.Module) -> Iterator[tuple[str, Tensor, Source]]:
    """Every tensor of an export module: (name, empty tensor of the stored shape and dtype, source with full names)."""
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
    """Reorder each head's rows from RoPE's pairs (0, 1), (2, 3), … to (0, head_dim/2), (1, head_dim/2 + 1), …

    Queries and keys get the same order, so their dot products do not change; rotating halves needs no strided access.
    """
    heads = rows.unflatten(0, (-1, head_dim // 2, 2))
    return heads.transpose(1, 2).reshape(rows.shape)


class Linear(nn.Module):
    """A matrix product with the weight stored as [in, out], so that the graph holds no Transpose.

    Several of the checkpoint's matrices that share an input are stored as one (`names`, one output size each; a part
    with a `head_dims` other than 0 is stored in the order of `half_split`). With a bias the result is fp32, otherwise
    it has the compute dtype. `scale`, a power of two, keeps inputs that are no norm's in range: the input is multiplied
    by it and the fp32 result divided, which needs a bias.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int | tuple[int, ...],
        precision: Precision,
        *,
        bias: bool = False,
        names: tuple[str, ...] = ("{}",),
        fp32: bool = False,
        head_dims: tuple[int, ...] = (),
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.scale = scale
        sizes = (out_features,) if isinstance(out_features, int) else out_features
        self.sizes, self.names, self.head_dims = sizes, names, head_dims or (0,) * len(sizes)
        self.compute = torch.float32 if fp32 else precision.compute
        self.weight = nn.Parameter(torch.empty(in_features, sum(sizes), dtype=precision.storage), requires_grad=False)

        def assemble(parts: Sequence[Tensor]) -> Tensor:
            heads = zip(parts, self.head_dims, strict=True)
            rows = [half_split(part, head_dim) if head_dim else part for part, head_dim in heads]
            return (rows[0] if len(rows) == 1 else _joined(rows)).t()

        self.sources = {
            "weight": Source(
                tuple(f"{name}.weight" for name in names),
                tuple((size, in_features) for size in sizes),
                assemble,
            )
        }
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.empty(sum(sizes)), requires_grad=False)
            self.sources["bias"] = Source(
                tuple(f"{name}.bias" for name in names), tuple((size,) for size in sizes), _joined
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
    """Root-mean-square norm in fp32; `scale` is what the input was multiplied by, eps follows it."""

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
        # Division by a square root, not rsqrt: the form that ONNX Runtime and TensorRT fuse into one kernel.
        return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


def _constant(value: Tensor, _: Sequence[Tensor]) -> Tensor:
    return value


class Constants(nn.Module):
    """Named tensors computed at export and stored beside the weights.

    The values are made on the CPU even while modules are built on the meta device.
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
    """SiLU(gate) * up, both scaled first so that their product stays in range."""
    gate = torch.nn.functional.silu(gate)
    if precision.gate_scale != 1.0:
        gate, up = gate * precision.gate_scale, up * precision.up_scale
    return gate * up


def attention(q: Tensor, k: Tensor, v: Tensor, precision: Precision, mask: Tensor | None = None) -> Tensor:
    """Softmax(q kᵀ / sqrt(head_dim)) v with an fp32 softmax; in the form that TensorRT fuses.

    Shapes: q [batch, heads, queries, head_dim], k and v [batch, heads, keys, head_dim] (with a fifth dimension it is
    not fused), mask added to [batch, heads, queries, keys].
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
    """[tokens, head_dim / 2] twice -> what `rotate` takes, [tokens, 1, head_dim] twice."""
    return torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((-sin, sin), -1).unsqueeze(1)
