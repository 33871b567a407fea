"""Simplifies traced graphs."""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import optimizer


def simplify(model: ir.Model, name: str) -> None:
    """Folds constants, drops dead nodes and metadata, in place; names the graph. Weights stay in their file."""
    optimizer.optimize(model)
    for node in model.graph:
        # The tracer's stack traces take half of the file and contain this machine's paths.
        node.metadata_props.clear()
        node.doc_string = None
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.name = name
    model.producer_name = "zimage-export"
