"""Splits attention that TensorRT does not fuse along its queries, which bounds the memory of its scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, numpy_helper
from onnx.helper import make_node

# Attention is not split up to this many scores per batch: 2.1 GB in fp32, two images of 1024 x 1024. The full VAE's
# convolutions need more memory than that, and pieces take longer to build.
WHOLE_SCORES = 2**29
# Scores per piece and image: 128 MB in fp32.
PIECE_SCORES = 2**25
# TensorRT holds the scores of about nine pieces at a time, independent of their number (TensorRT-RTX 1.7.1,
# `activation_bytes` of plans with 16 and 64 pieces). More pieces cost launches and save little memory.
MOST_PIECES = 64


@dataclasses.dataclass(frozen=True)
class Attention:
    """Nodes of an attention: softmax(queries @ keys) @ values.

    Attributes:
        scores: the product of queries and keys.
        between: the softmax with the casts before and after it, in order.
        output: the product with the values.
    """

    scores: NodeProto
    between: tuple[NodeProto, ...]
    output: NodeProto

    @property
    def queries(self) -> str:
        """Name of the tensor `[..., query, head_size]`."""
        return self.scores.input[0]


def find_attentions(graph: onnx.GraphProto) -> list[Attention]:
    """Finds all attentions without a mask in a graph, in order."""
    producers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found = []
    for softmax in graph.node:
        if softmax.op_type != "Softmax":
            continue
        between, first, last = [softmax], producers.get(softmax.input[0]), readers.get(softmax.output[0], [])
        while first is not None and first.op_type == "Cast":
            between.insert(0, first)
            first = producers.get(first.input[0])
        while len(last) == 1 and last[0].op_type == "Cast":
            between.append(last[0])
            last = readers.get(last[0].output[0], [])
        if first is None or first.op_type != "MatMul" or len(last) != 1 or last[0].op_type != "MatMul":
            continue
        if last[0].input[0] == between[-1].output[0]:
            found.append(Attention(first, tuple(between), last[0]))
    return found


def count_pieces(batch: int, queries: int, keys: int) -> int:
    """Number of pieces for scores `[batch, query, key]`: 1, or enough for `PIECE_SCORES` per image and piece."""
    if batch * queries * keys <= WHOLE_SCORES:
        return 1
    return max(2, min(-(-queries * keys // PIECE_SCORES), MOST_PIECES))


def cut_queries(model: onnx.ModelProto, counts: Mapping[str, int]) -> onnx.ModelProto:
    """Splits attentions along their queries: a row of the output depends only on its own query.

    Args:
        model: its weights are external data; it is not changed.
        counts: number of pieces by name of the queries' tensor, fp32 or bf16 `[batch, query, head_size]`. Other
            attentions are not split.

    Returns:
        A model with the same inputs, outputs and results. Queries are padded with zeros to a multiple of the number
        of pieces, and the padding's rows are dropped.
    """
    cut = onnx.ModelProto()
    cut.CopyFrom(model)
    chosen = {attention.output.name: attention for attention in find_attentions(cut.graph)}
    replaced = {name for name, attention in chosen.items() if counts.get(attention.queries, 1) > 1}
    dropped = {node.name for name in replaced for node in (chosen[name].scores, *chosen[name].between)}
    nodes: list[NodeProto] = []
    for node in cut.graph.node:
        if node.name in replaced:
            nodes += _pieces(cut.graph, chosen[node.name], counts[chosen[node.name].queries])
        elif node.name not in dropped:
            nodes.append(node)
    del cut.graph.node[:]
    cut.graph.node.extend(nodes)
    return cut


def _pieces(graph: onnx.GraphProto, attention: Attention, count: int) -> list[NodeProto]:
    """Nodes that replace an attention; adds their constants to the graph."""
    prefix = f"{attention.output.name}_pieces"
    nodes: list[NodeProto] = []

    def constant(name: str, value: int | list[int]) -> str:
        graph.initializer.append(numpy_helper.from_array(np.asarray(value, np.int64), f"{prefix}_{name}"))
        return f"{prefix}_{name}"

    def add(operator: str, inputs: list[str], name: str, **attributes: Any) -> str:
        nodes.append(make_node(operator, inputs, [f"{prefix}_{name}"], f"{prefix}_node_{name}", **attributes))
        return f"{prefix}_{name}"

    queries = attention.queries
    pieces, zero, one = constant("count", [count]), constant("zero", [0]), constant("one", [1])
    batch, rows, size = (
        add("Shape", [queries], name, start=axis, end=axis + 1) for axis, name in enumerate(("batch", "rows", "size"))
    )
    most = add("Add", [rows, constant("count_less_one", [count - 1])], "most")
    piece = add("Div", [most, pieces], "piece")
    missing = add("Sub", [add("Mul", [piece, pieces], "padded_rows"), rows], "missing")
    pads = add("Concat", [constant("zeros", [0] * 4), missing, zero], "pads", axis=0)
    shape = add("Concat", [batch, pieces, piece, size], "shape", axis=0)
    split = add("Reshape", [add("Pad", [queries, pads], "padded"), shape], "split")
    outputs = []
    for i in range(count):
        name = add("Gather", [split, constant(f"index_{i}", i)], f"queries_{i}", axis=1)
        for node in (attention.scores, *attention.between, attention.output):
            copy = NodeProto()
            copy.CopyFrom(node)
            copy.name, copy.input[0] = f"{node.name}_{i}", name
            name = copy.output[0] = f"{node.output[0]}_{i}"
            nodes.append(copy)
        outputs.append(name)
    joined = add("Concat", outputs, "joined", axis=1)
    # The last node keeps the output's name, which other nodes read.
    nodes.append(make_node("Slice", [joined, zero, rows, one], list(attention.output.output), f"{prefix}_node_slice"))
    return nodes
