"""Splits a module's graph into several between its blocks; all read the same weight file."""

from __future__ import annotations

import re
from collections.abc import Iterable

import onnx

from ..errors import ExportError

# A block's weights are named `layers.{i}.…` in the transformer and in the text encoder.
_BLOCK = re.compile(r"^layers\.(\d+)\.")


def split(model: onnx.ModelProto, firsts: Iterable[int], tokens: str, width: int) -> list[onnx.ModelProto]:
    """Splits a graph before the blocks `firsts`.

    Only the residual stream passes from one part to the next. A later part computes sizes, rotary tables and the
    timestep's embedding again from the module's inputs, which takes a few small kernels.

    Args:
        model: its weights are external data, which is not changed.
        firsts: index of the first block of each part after the first, ascending.
        tokens: name of the number of tokens in the residual stream's shape [batch, tokens, width].
        width: last size of the residual stream.

    Raises:
        ExportError: the graph has no such block, or a block would run twice.
    """
    graph = model.graph
    borders = [_border(graph, first) for first in firsts]
    parts = []
    for start, end in zip([None, *borders], [*borders, None], strict=True):
        inputs = [] if start is None else [_spec(start, tokens, width)]
        outputs = list(graph.output) if end is None else [_spec(end, tokens, width)]
        parts.append(_extract(model, inputs, outputs))
    seen: set[int] = set()
    for part in parts:
        blocks = {block for tensor in part.graph.initializer if (block := _block(tensor.name)) is not None}
        if seen & blocks:
            raise ExportError(f"{graph.name}: block {min(seen & blocks)} would run twice if it were split there")
        seen |= blocks
    return parts


def _spec(name: str, tokens: str, width: int) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", tokens, width])


def _block(name: str) -> int | None:
    match = _BLOCK.match(name)
    return None if match is None else int(match[1])


def _border(graph: onnx.GraphProto, first: int) -> str:
    """Name of the tensor between block `first` and the blocks before it.

    Block `first` and later ones depend on the weights of earlier blocks through this tensor alone.
    """
    before = {
        tensor.name for tensor in graph.initializer if (block := _block(tensor.name)) is not None and block < first
    }
    after = {tensor.name for tensor in graph.initializer if (block := _block(tensor.name)) is not None} - before
    entering: set[str] = set()
    for node in graph.node:
        if any(name in after for name in node.input):
            after.update(node.output)
            entering.update(name for name in node.input if name in before)
        elif node.op_type != "Shape" and any(name in before for name in node.input):
            before.update(node.output)  # a size does not depend on weights
    producers = {name: node for node in graph.node for name in node.output}
    found = False
    for node in reversed(graph.node):
        # A norm and a residual add read it, so it is computed before the first of them.
        found = found or node.output[0] in entering
        if found and _all_through(producers, entering, node.output[0]):
            return node.output[0]
    raise ExportError(f"{graph.name}: expected a block {first} to split in front of, found none")


def _all_through(producers: dict[str, onnx.NodeProto], names: Iterable[str], border: str) -> bool:
    """Whether a walk back from `names`, which stops at `border`, reaches no block's weights."""
    seen, waiting = {border}, list(names)
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        if _block(name) is not None:
            return False
        if name in producers:
            waiting.extend(producers[name].input)
    return True


def _extract(
    model: onnx.ModelProto, inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]
) -> onnx.ModelProto:
    """Extracts the nodes that compute `outputs` from `inputs`, the graph's own inputs and its weights."""
    graph = model.graph
    needed = {value.name for value in outputs}
    given = {value.name for value in inputs}
    nodes = []
    for node in reversed(graph.node):
        if any(name in needed and name not in given for name in node.output):
            nodes.append(node)
            needed.update(node.input)
    part = onnx.ModelProto()
    part.CopyFrom(model)
    del (
        part.graph.node[:],
        part.graph.initializer[:],
        part.graph.input[:],
        part.graph.output[:],
        part.graph.value_info[:],
    )
    part.graph.node.extend(reversed(nodes))
    part.graph.initializer.extend(tensor for tensor in graph.initializer if tensor.name in needed)
    part.graph.input.extend([*inputs, *(value for value in graph.input if value.name in needed)])
    part.graph.output.extend(outputs)
    return part
