"""Convolutions in 8 bits with ranges that were measured before, by ONNX Runtime's own tools.

Activations are unsigned, weights signed with a scale per output channel: ONNX Runtime multiplies these with VNNI. With
unsigned weights the same graph is four times as slow (1.32).
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from safetensors.numpy import save

from zimage_rt.bundle.safetensors_file import TensorFile

from .trace import quiet

# Besides convolutions: what stands between them, so that numbers stay in 8 bits from one to the next.
OPERATORS = ("Conv", "Relu", "Add", "Resize")
# Numbers of a tensor that is moved to the weight file; factors and zero points stay in the graph.
SMALLEST = 16


class _Samples(CalibrationDataReader):
    """Inputs of one sample each."""

    def __init__(self, name: str, samples: np.ndarray) -> None:
        self.inputs = iter([{name: sample[None]} for sample in samples])

    def get_next(self) -> dict[str, np.ndarray] | None:
        """See the base."""
        return next(self.inputs, None)


def quantize_convolutions(graph: Path, weights: Path, samples: np.ndarray) -> None:
    """Rewrites a graph of one input and its weight file with convolutions in 8 bits.

    The last convolution stays as it is: what it gives is the result itself, and nothing is gained (44.1 instead of
    43.1 dB in the worst of eight images of zimage-nano).

    Args:
        graph: ONNX, with its weights in `weights` as external data.
        weights: safetensors.
        samples: inputs [samples, ...], from which the ranges of all activations are taken.
    """
    with tempfile.TemporaryDirectory(prefix="int8-", dir=graph.parent) as name:
        plain, quantized = Path(name, "plain.onnx"), Path(name, "int8.onnx")
        model = onnx.load(graph)
        onnx.save(model, plain)
        last = [node.name for node in model.graph.node if node.op_type == "Conv"][-1]
        with quiet():
            quantize_static(
                plain,
                quantized,
                _Samples(model.graph.input[0].name, samples),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(OPERATORS),
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=[last],
            )
        result = onnx.load(quantized)
        result.producer_name, result.producer_version = model.producer_name, model.producer_version
        moved = {"weights": Path(name, "weights"), "graph": Path(name, "graph")}
        _move_weights(result, moved["weights"], weights.name)
        moved["graph"].write_bytes(result.SerializeToString())
        moved["weights"].replace(weights)
        moved["graph"].replace(graph)


def _move_weights(model: Any, file: Path, name: str) -> None:
    """Writes the weights to a safetensors file, and points the graph's to it as external data in `name`."""
    # ONNX infers shapes from what is smaller.
    tensors = [tensor for tensor in model.graph.initializer if math.prod(tensor.dims) >= SMALLEST]
    file.write_bytes(save({tensor.name: numpy_helper.to_array(tensor) for tensor in tensors}))
    stored = TensorFile(file)
    for tensor in tensors:
        first, end = stored.tensors[tensor.name]["data_offsets"]
        for field in ("raw_data", "float_data", "int32_data", "int64_data"):
            tensor.ClearField(field)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", name), ("offset", stored.data_start + first), ("length", end - first)):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, str(value)
