"""A writer of ONNX models with one input and one output, without the onnx package.

The numbers of the fields are those of onnx.proto. Messages are lists of pieces, so that weights are copied once, into
the finished model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Pieces of a protobuf message, in order.
Pieces = list[bytes | memoryview]

_IR_VERSION, _OPSET = 8, 17
_FLOAT = 1  # TensorProto.FLOAT
# AttributeProto: the field of a value, and the number of its type.
_ATTRIBUTES = {float: (2, 1), int: (3, 2), str: (4, 3), list: (8, 7)}


class OnnxGraph:
    """A graph of images, fp32 `[1, channels, height, width]`, that grows node by node.

    Args:
        channels: of its input, whose height and width are free.

    Attributes:
        input: the input's name.
    """

    def __init__(self, channels: int) -> None:
        self.input = "image"
        self._channels = channels
        self._nodes: list[Pieces] = []
        self._weights: list[Pieces] = []

    def add(self, kind: str, inputs: Sequence[str], **attributes: float | int | str | list[int]) -> str:
        """Append a node of ONNX type `kind`; the name of its output. An input of "" is left out."""
        output = f"n{len(self._nodes)}"
        self._nodes.append(
            [
                *(piece for name in inputs for piece in _text(1, name)),
                *_text(2, output),
                *_text(4, kind),
                *(piece for name, value in attributes.items() for piece in _field(5, _attribute(name, value))),
            ]
        )
        return output

    def weight(self, array: np.ndarray) -> str:
        """Append an fp32 array as a constant; its name."""
        name = f"w{len(self._weights)}"
        content = np.ascontiguousarray(array, "<f4").data.cast("B")
        self._weights.append([*_packed(1, array.shape), *_number(2, _FLOAT), *_text(8, name), *_field(9, [content])])
        return name

    def model(self, output: str, channels: int) -> bytes:
        """The model, whose output is that of a node."""
        graph: Pieces = [
            *(piece for node in self._nodes for piece in _field(1, node)),
            *_text(2, "upscale"),
            *(piece for weight in self._weights for piece in _field(5, weight)),
            *_field(11, _value(self.input, self._channels, "")),
            *_field(12, _value(output, channels, "out_")),
        ]
        opset: Pieces = [*_text(1, ""), *_number(2, _OPSET)]
        return b"".join([*_number(1, _IR_VERSION), *_text(2, "zimage_rt"), *_field(7, graph), *_field(8, opset)])


def _value(name: str, channels: int, prefix: str) -> Pieces:
    """A ValueInfoProto: a name, and the type with its shape."""
    sizes: list[Pieces] = [_number(1, 1), _number(1, channels), _text(2, f"{prefix}height"), _text(2, f"{prefix}width")]
    shape: Pieces = [piece for size in sizes for piece in _field(1, size)]
    tensor: Pieces = [*_number(1, _FLOAT), *_field(2, shape)]
    return [*_text(1, name), *_field(2, _field(1, tensor))]


def _attribute(name: str, value: float | int | str | list[int]) -> Pieces:
    field, number = _ATTRIBUTES[type(value)]
    content: Pieces
    if isinstance(value, float):
        content = [_varint(field << 3 | 5), np.float32(value).tobytes()]
    elif isinstance(value, str):
        content = _text(field, value)
    elif isinstance(value, int):
        content = _number(field, value)
    else:
        content = _packed(field, value)
    return [*_text(1, name), *content, *_number(20, number)]


def _field(number: int, pieces: Pieces) -> Pieces:
    """A length-delimited field."""
    return [_varint(number << 3 | 2), _varint(sum(len(piece) for piece in pieces)), *pieces]


def _text(number: int, value: str) -> Pieces:
    return _field(number, [value.encode()])


def _number(number: int, value: int) -> Pieces:
    return [_varint(number << 3), _varint(value)]


def _packed(number: int, values: Sequence[int]) -> Pieces:
    return _field(number, [_varint(value) for value in values])


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    found.append(value)
    return bytes(found)
