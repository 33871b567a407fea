"""Makes a traced graph lean."""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import optimizer


def simplify(model: ir.Model, name: str) -> None:
    """Fold constants and drop dead nodes, in place. Weights stay in their file."""
    optimizer.optimize(model)
    for node in model.graph:
        # Stack traces of the tracer: half of the file's size, and this machine's paths.
        node.metadata_props.clear()
        node.doc_string = None
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.name = name
    model.producer_name = "zimage-export"
