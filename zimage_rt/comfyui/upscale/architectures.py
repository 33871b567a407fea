"""The networks of ESRGAN-type files, told by the names of their weights, as ONNX graphs.

RRDBNet is the network of ESRGAN (Wang et al., 2018) and of Real-ESRGAN; SRVGGNetCompact is Real-ESRGAN's small one.
Names of three generations of RRDBNet are read: ESRGAN's own (`model.1.sub.0.RDB1…`), BSRGAN's (`RRDB_trunk.0.RDB1…`)
and BasicSR's (`body.0.rdb1…`).
"""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np

from .onnx_graph import OnnxGraph
from .weights import Weights

# RRDBNet adds a fifth of each residual.
RESIDUAL = 0.2
SLOPE = 0.2  # of LeakyReLU
MAX_DOUBLINGS = 3
# Names of weights that tell other networks, which ComfyUI runs and this package does not.
_OTHERS = {
    "layers.0.residual_group.blocks.0.conv_block.cab.0.weight": "HAT",
    "layers.0.residual_group.td": "ATD",
    "layers.0.blocks.0.attn.attns.0.pos.pos3.0.weight": "DAT",
    "layers.0.swin1.norm1.weight": "DRCT",
    "patch_embed.proj.weight": "Swin2SR",
    "layers.0.residual_group.blocks.0.norm1.weight": "SwinIR",
    "block_1.c1_r.eval_conv.weight": "SPAN",
    "unet1.conv1.conv.0.weight": "RealCUGAN",
    "residual_layer.0.residual_layer.0.layer.0.fn.0.weight": "OmniSR",
    "feats.1.refine.weight": "PLKSR",
    "initial.cnn.depthwise.weight": "Swift-SRGAN",
    "m_head.0.weight": "SCUNet",
    "stylegan_decoder.style_mlp.1.weight": "GFPGAN",
}


@dataclasses.dataclass(frozen=True)
class Network:
    """A network as an ONNX model.

    Attributes:
        model: the model; its input and output are fp32 `[1, 3, height, width]`.
        scale: the output's size relative to the input's.
        multiple: its input's height and width must be multiples of it.
        least: its input's least height and width.
    """

    model: bytes
    scale: int
    multiple: int = 1
    least: int = 1


def build(weights: Weights) -> Network:
    """The network that weights belong to. Raises ValueError if it is not of the ESRGAN type, or lacks weights."""
    names = weights.shapes
    if {"body.0.weight", "body.1.weight"} <= names.keys():
        return _whole(_compact(weights), weights)
    if "conv_first.weight" in names and names.keys() & {"body.0.rdb1.conv1.weight", "RRDB_trunk.0.RDB1.conv1.weight"}:
        weights = _in_old_names(weights)
        return _whole(_Rrdb(weights).build(), weights)
    if "model.0.weight" in names and any(name.startswith("model.1.sub.0.RDB1.conv1") for name in names):
        return _whole(_Rrdb(weights).build(), weights)
    what = next((f"a {other} model" for name, other in _OTHERS.items() if name in names), "")
    what = what or f"weights named {', '.join(name[:80] for name in list(names)[:3])}"
    raise ValueError(
        f"expected an ESRGAN-type model (RRDBNet or SRVGGNetCompact), got {what}; "
        "take one such as RealESRGAN_x4plus or 4x-UltraSharp"
    )


def _whole(network: Network, weights: Weights) -> Network:
    """The network, if it has all of the weights: a variant of it would give another image. Raises ValueError."""
    left = weights.shapes.keys() - weights.used
    if left:
        raise ValueError(f"expected an RRDBNet or SRVGGNetCompact, got one with further weights: {min(left)[:80]}")
    return network


def _in_old_names(weights: Weights) -> Weights:
    """Weights by the names of ESRGAN's first code, whose numbers are places in the sequence of its modules."""
    indices = [re.match(r"(?:RRDB_trunk|body)\.(\d+)\.", name) for name in weights.shapes]
    blocks = max(int(found[1]) for found in indices if found) + 1
    ups = [re.match(r"(?:upconv|conv_up)(\d)\.", name) for name in weights.shapes]
    doublings = max((int(found[1]) for found in ups if found), default=0)
    rules = (
        (r"conv_first", "model.0"),
        (r"(?:RRDB_trunk|body)\.(\d+)\.(?:RDB|rdb)(\d)\.conv(\d)", r"model.1.sub.\1.RDB\2.conv\3.0"),
        (r"trunk_conv|conv_body", f"model.1.sub.{blocks}"),
        (r"HRconv|conv_hr", f"model.{3 * doublings + 2}"),
        (r"conv_last", f"model.{3 * doublings + 4}"),
    )

    def rename(name: str) -> str | None:
        module, _, kind = name.rpartition(".")
        if up := re.fullmatch(r"(?:upconv|conv_up)(\d)", module):
            return f"model.{3 * int(up[1])}.{kind}"
        for pattern, new in rules:
            if found := re.fullmatch(pattern, module):
                return f"{found.expand(new)}.{kind}"
        return None  # ComfyUI leaves out what is no part of the network, too

    return weights.renamed(rename)


class _Rrdb:
    """RRDBNet, read by the names of ESRGAN's first code."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        last = max(_numbers(weights, "model."))
        self._doublings, rest = divmod(last - 4, 3)
        if rest or not 0 <= self._doublings <= MAX_DOUBLINGS:
            raise ValueError(f"expected the last layer at model.4, 7, 10 or 13, got {last}")
        self._last = last
        self._blocks = max(_numbers(weights, "model.1.sub."))  # the layer after the blocks has the next number
        self._features, channels = _sizes(weights, "model.0.weight")
        # Networks for less than four times the size take an image in squares of 2 or 4 pixels.
        self._square = {3: 1, 12: 2, 48: 4}.get(channels, 0)
        if not self._square or 2**self._doublings % self._square:
            raise ValueError(f"model.0.weight: expected 3, 12 or 48 input channels, got {channels}")
        self._growth = _sizes(weights, "model.1.sub.0.RDB1.conv1.0.weight")[0]
        self._is_plus = any(".conv1x1." in name for name in weights.shapes)
        self._graph = OnnxGraph(3)

    def build(self) -> Network:
        """The network. Raises ValueError if weights are missing, or are of another shape."""
        graph, square = self._graph, self._square
        found = graph.input
        if square > 1:
            found = graph.add("SpaceToDepth", [found], blocksize=square)
        first = found = self._first(found)
        for block in range(self._blocks):
            inside = found
            for dense in (1, 2, 3):
                inside = self._dense(inside, f"model.1.sub.{block}.RDB{dense}")
            scaled = graph.add("Mul", [inside, graph.weight(np.full((1,), RESIDUAL, np.float32))])
            found = graph.add("Add", [scaled, found])
        found = graph.add("Add", [self._conv(found, f"model.1.sub.{self._blocks}", self._features), first])
        for doubling in range(1, self._doublings + 1):
            found = _enlarged(graph, found, 2)
            found = self._leaky(self._conv(found, f"model.{3 * doubling}", self._features))
        found = self._leaky(self._conv(found, f"model.{self._last - 2}", self._features))
        found = self._conv(found, f"model.{self._last}", self._features, 3)
        # Reflecting one or two rows needs as many more; one row less and there is nothing to reflect.
        return Network(graph.model(found, 3), 2**self._doublings // square, 4 if square > 1 else 1, 2)

    def _first(self, image: str) -> str:
        square = self._square
        weight = self._weights.read("model.0.weight", self._features, 3 * square**2, 3, 3)
        # PyTorch counts the channels of a square by colour and then by place, ONNX by place and then by colour.
        weight = weight.reshape(self._features, 3, square**2, 3, 3).swapaxes(1, 2).reshape(weight.shape)
        bias = self._weights.read("model.0.bias", self._features)
        return _conv(self._graph, image, weight, bias)

    def _dense(self, image: str, name: str) -> str:
        graph, features, growth = self._graph, self._features, self._growth
        parts = [image]
        for number in (1, 2, 3, 4):
            joined = graph.add("Concat", parts, axis=1) if len(parts) > 1 else image
            channels = features + (number - 1) * growth
            part = self._leaky(self._conv(joined, f"{name}.conv{number}.0", channels, growth))
            if self._is_plus and number == 2:
                straight = self._weights.read(f"{name}.conv1x1.weight", growth, features, 1, 1)
                part = graph.add("Add", [part, _conv(graph, image, straight, np.zeros(growth, np.float32))])
            if self._is_plus and number == 4:
                part = graph.add("Add", [part, parts[2]])
            parts.append(part)
        joined = graph.add("Concat", parts, axis=1)
        # The residual's factor is in the weights, so that ONNX Runtime adds it within the convolution.
        last = self._conv(joined, f"{name}.conv5.0", features + 4 * growth, features, RESIDUAL)
        return graph.add("Add", [last, image])

    def _conv(self, image: str, name: str, channels: int, outputs: int = 0, factor: float = 1.0) -> str:
        outputs = outputs or self._features
        weight = self._weights.read(f"{name}.weight", outputs, channels, 3, 3)
        bias = self._weights.read(f"{name}.bias", outputs)
        return _conv(self._graph, image, weight * np.float32(factor), bias * np.float32(factor))

    def _leaky(self, image: str) -> str:
        return self._graph.add("LeakyRelu", [image], alpha=SLOPE)


def _compact(weights: Weights) -> Network:
    """SRVGGNetCompact: convolutions with a learnt slope each, and the enlarged image added at the end."""
    last = max(_numbers(weights, "body."))
    features, channels = _sizes(weights, "body.0.weight")
    outputs = weights.shapes.get(f"body.{last}.bias", (0,))[0]
    scale = math.isqrt(outputs // 3)
    if channels != 3 or not 1 <= scale <= 16 or outputs != 3 * scale**2 or last % 2:
        raise ValueError(
            f"expected a model of 3 colours, got {channels} input and {outputs} output channels in {last + 1} layers"
        )
    graph = OnnxGraph(3)
    found = graph.input
    for layer in range(0, last + 1, 2):
        inputs = features if layer else 3
        shape = (outputs if layer == last else features, inputs, 3, 3)
        weight, bias = weights.read(f"body.{layer}.weight", *shape), weights.read(f"body.{layer}.bias", shape[0])
        found = _conv(graph, found, weight, bias)
        if layer < last:
            slope = weights.read(f"body.{layer + 1}.weight", features)
            found = graph.add("PRelu", [found, graph.weight(slope.reshape(features, 1, 1))])
    base = graph.input
    if scale > 1:
        found = graph.add("DepthToSpace", [found], blocksize=scale, mode="CRD")
        base = _enlarged(graph, base, scale)
    return Network(graph.model(graph.add("Add", [found, base]), 3), scale)


def _conv(graph: OnnxGraph, image: str, weight: np.ndarray, bias: np.ndarray) -> str:
    edge = weight.shape[-1] // 2
    return graph.add(
        "Conv", [image, graph.weight(weight), graph.weight(bias)], kernel_shape=list(weight.shape[2:]), pads=[edge] * 4
    )


def _enlarged(graph: OnnxGraph, image: str, scale: int) -> str:
    """An image whose pixels are repeated."""
    factors = graph.weight(np.array([1, 1, scale, scale], np.float32))
    return graph.add(
        "Resize",
        [image, "", factors],
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )


def _numbers(weights: Weights, prefix: str) -> list[int]:
    """The numbers that follow a prefix in names."""
    texts = (name.removeprefix(prefix).partition(".")[0] for name in weights.shapes if name.startswith(prefix))
    return [int(text) for text in texts if re.fullmatch(r"\d{1,6}", text)]


def _sizes(weights: Weights, name: str) -> tuple[int, int]:
    """Outputs and inputs of a convolution, at least 1. Raises ValueError."""
    shape = weights.shapes.get(name, ())
    if len(shape) != 4 or min(shape) < 1:
        raise ValueError(f"{name}: expected the weights of a convolution, got {list(shape)}")
    return shape[0], shape[1]
