"""Traces a torch module on the meta device to an ONNX graph without weights."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping

import onnx_ir as ir
import torch
from torch import nn
from torch.export import Dim

from zimage_rt.bundle.manifest import TensorSpec

from ..errors import ExportError
from .quantized import translations

OPSET = 20

# A size per symbol for tracing. All differ, so that torch cannot identify two symbols; none is 0 or 1, which it would
# specialise on.
_SAMPLE_SIZES = {
    "batch": 3,
    "prompt_tokens": 37,
    "context_tokens": 64,
    "latent_height": 14,
    "latent_width": 22,
    "height": 112,
    "width": 176,
}


def _dims(multiples: Mapping[str, int]) -> dict[str, object]:
    """torch's symbols for the free sizes; a size with a divisor is a product."""
    dims: dict[str, object] = {}
    for name in _SAMPLE_SIZES:
        multiple = multiples.get(name, 1)
        base = Dim(name if multiple == 1 else f"_{name}", min=1)
        dims[name] = base if multiple == 1 else multiple * base
    return dims


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences ONNX's tools, which print progress to stdout and warn."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            open(os.devnull, "w", encoding="utf-8") as sink,  # noqa: PTH123
            contextlib.redirect_stdout(sink),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def trace(
    module: nn.Module,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    multiples: Mapping[str, int],
) -> ir.Model:
    """Traces a module on the meta device.

    Args:
        module: its parameters have shapes and dtypes, but no values.
        inputs, outputs: its tensors; free sizes become dim names of the graph.
        multiples: divisor of each free size that needs one.

    Returns:
        A model with empty initializers; `weights.attach` points them to a file.
    """
    dims = _dims(multiples)
    arguments = tuple(
        torch.empty(
            [_SAMPLE_SIZES[dim] if isinstance(dim, str) else dim for dim in spec.dims],
            dtype=getattr(torch, spec.dtype),
            device="meta",
        )
        for spec in inputs
    )
    shapes = tuple({i: dims[dim] for i, dim in enumerate(spec.dims) if isinstance(dim, str)} for spec in inputs)
    with quiet(), torch.no_grad():
        exported = torch.export.export(module, arguments, dynamic_shapes=shapes, strict=False)
        program = torch.onnx.export(
            exported,
            input_names=[spec.name for spec in inputs],
            output_names=[spec.name for spec in outputs],
            opset_version=OPSET,
            dynamo=True,
            optimize=False,
            custom_translation_table=translations(),
            verbose=False,
        )
    if program is None:  # only if it writes a file itself
        raise ExportError("torch.onnx.export returned nothing")
    model = program.model
    for values, specs in ((model.graph.inputs, inputs), (model.graph.outputs, outputs)):
        for value, spec in zip(values, specs, strict=True):
            value.name = spec.name
            value.shape = ir.Shape(spec.dims)
    return model
