"""ONNX Runtime runs the bundle's graphs as they are; this makes them lean first."""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import optimizer

from ..modules import ModulePlan


def simplify(model: ir.Model, plan: ModulePlan) -> None:
    """Fold constants and drop dead nodes, in place. Weights stay in their file."""
    optimizer.optimize(model)
    model.graph.name = plan.name
    model.producer_name = "zimage-export"
