"""The external data files of an ONNX graph, found without the onnx package.

A graph may name files that hold its weights, and ONNX Runtime opens whatever it names, so a bundle's graph is scanned
for these names first. The numbers are the field numbers of onnx.proto.
"""

from __future__ import annotations

from collections.abc import Iterator

# Message → field → type of the message in the field. Fields that are not listed contain no tensor.
_MESSAGES: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_KEY, _VALUE = 1, 2  # in an entry of `external_data`
_OP_TYPE = 4  # in a node
# ONNX Runtime's operator that loads a compiled program, possibly from a file.
_PROGRAM = b"EPContext"


def external_files(graph: bytes | memoryview) -> set[str]:
    """The paths of a graph's external data, as written in the graph.

    Raises ValueError: it is no ONNX graph, or it has an operator that loads a compiled program.
    """
    found: set[str] = set()
    pending: list[tuple[str, memoryview]] = [("model", memoryview(graph))]
    while pending:
        message, content = pending.pop()
        entry: dict[int, bytes] = {}
        for field, value in _fields(content):
            inner = _MESSAGES.get(message, {}).get(field)
            if inner is not None:
                pending.append((inner, value))
            elif message == "entry":
                entry[field] = bytes(value)
            elif message == "node" and field == _OP_TYPE and bytes(value) == _PROGRAM:
                raise ValueError("it holds a compiled program (EPContext)")
        if entry.get(_KEY) == b"location":
            found.add(entry.get(_VALUE, b"").decode())
    return found


def _fields(content: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The length-delimited fields of a protobuf message; other fields contain no message and no text."""
    position = 0
    while position < len(content):
        tag, position = _varint(content, position)
        kind = tag & 7
        if kind == 0:
            _, position = _varint(content, position)
        elif kind in (1, 5):
            position += 8 if kind == 1 else 4
        elif kind == 2:
            length, position = _varint(content, position)
            if position + length > len(content):
                raise ValueError("it is no ONNX graph, or cut short")
            yield tag >> 3, content[position : position + length]
            position += length
        else:
            raise ValueError("it is no ONNX graph")
    if position > len(content):
        raise ValueError("it is no ONNX graph, or cut short")


def _varint(content: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(content) and shift < 64:
        byte = content[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
    raise ValueError("it is no ONNX graph, or cut short")
