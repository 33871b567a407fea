#!/usr/bin/env bash
# TensorRT-RTX: the ONNX parser accepts `nonpad_kv_seqlen` of an opset-24 Attention and drops it.
#
# Expected: keys behind the given length are masked, as ONNX's own reference implementation does, or the parser refuses.
# Seen: `parse` succeeds with no error, and no layer of the network reads the input. The builder then warns of an unused
# input. A plan would attend to the padding. No GPU is needed to see it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.4.6 onnx==1.23.2 tensorrt-rtx-cu13==1.7.1.116
"$folder/venv/bin/python" - <<'PY'
import sys

import numpy as np
import onnx
import tensorrt_rtx as trt
from onnx import TensorProto, checker, helper
from onnx.reference import ReferenceEvaluator

SHAPE = [1, 2, 8, 64]  # [batch, heads, tokens, head size]
inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, SHAPE) for name in "qkv"]
length = helper.make_tensor_value_info("length", TensorProto.INT64, [1])
output = helper.make_tensor_value_info("y", TensorProto.FLOAT16, SHAPE)
node = helper.make_node("Attention", ["q", "k", "v", "", "", "", "length"], ["y"])
graph = helper.make_graph([node], "g", [*inputs, length], [output])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)
checker.check_model(model, full_check=True)

random = np.random.default_rng(0)
arrays = {name: random.standard_normal(SHAPE).astype(np.float16) for name in "qkv"}
evaluator = ReferenceEvaluator(model)
whole, short = (evaluator.run(None, {**arrays, "length": np.array([n])})[0] for n in (8, 3))
change = float(np.abs(whole.astype(np.float32) - short).max())
print(f"onnx {onnx.__version__}, its reference: lengths 8 and 3 differ by up to {change:.2f}")

logger = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(logger)
network = builder.create_network(0)
parser = trt.OnnxParser(network, logger)
accepted = parser.parse(model.SerializeToString())
readers = [
    layer.name
    for layer in map(network.get_layer, range(network.num_layers))
    if any(tensor is not None and tensor.name == "length" for tensor in map(layer.get_input, range(layer.num_inputs)))
]
attention = any("ATTENTION" in str(network.get_layer(i).type) for i in range(network.num_layers))
print(f"tensorrt_rtx {trt.__version__}: accepted {accepted}, errors {parser.num_errors}, attention layer {attention}")
print(f"layers that read `length`: {readers or 'none'}")
same = change > 0.1 and accepted and parser.num_errors == 0 and attention and not readers
print("as described" if same else "CHANGED")
sys.exit(0 if same else 1)
PY
