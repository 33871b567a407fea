#!/usr/bin/env bash
# ONNX Runtime, MatMulInteger on the CPU: signed activations take many times as long as unsigned ones.
#
# Expected: int8 x int8 is about as fast as uint8 x int8, as the operator allows both and CPUs have instructions for it.
# Seen: uint8 activations run in MLAS's kernels, int8 ones in a plain loop that is slower than the product in fp32. Moving
# the numbers by 128, with a zero point of 128, gives the same sums at the speed of the unsigned ones.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0
"$folder/venv/bin/python" - <<'PY'
import sys
import time

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

ROWS, INNER, COLUMNS = 288, 384, 1152
print(f"onnxruntime {ort.__version__}, [{ROWS}, {INNER}] x [{INNER}, {COLUMNS}] on one thread")
random = np.random.default_rng(0)
weight = random.integers(-127, 128, (INNER, COLUMNS), np.int8)
numbers = random.integers(-127, 128, (ROWS, INNER), np.int8)


def session(kind: int, zero: np.ndarray | None) -> ort.InferenceSession:
    """A product with whole numbers of a type, or in fp32 for FLOAT."""
    stored = weight.astype(np.float32) if kind == TensorProto.FLOAT else weight
    initializers = [numpy_helper.from_array(stored, "w")]
    names = ["a", "w"]
    if zero is not None:
        initializers.append(numpy_helper.from_array(zero, "zero"))
        names.append("zero")
    operator = "MatMul" if kind == TensorProto.FLOAT else "MatMulInteger"
    result = TensorProto.FLOAT if kind == TensorProto.FLOAT else TensorProto.INT32
    graph = helper.make_graph(
        [helper.make_node(operator, names, ["y"])],
        "g",
        [helper.make_tensor_value_info("a", kind, [ROWS, INNER])],
        [helper.make_tensor_value_info("y", result, [ROWS, COLUMNS])],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(kind: int, activations: np.ndarray, zero: np.ndarray | None = None) -> tuple[np.ndarray, float]:
    """The product, and the least milliseconds that it took."""
    product, times = session(kind, zero), []
    for _ in range(30):
        start = time.perf_counter()
        result = product.run(None, {"a": activations})[0]
        times.append(1000 * (time.perf_counter() - start))
    return result, min(times)


signed, signed_ms = run(TensorProto.INT8, numbers)
moved = (numbers.astype(np.int16) + 128).astype(np.uint8)
unsigned, unsigned_ms = run(TensorProto.UINT8, moved, np.array(128, np.uint8))
_, float_ms = run(TensorProto.FLOAT, numbers.astype(np.float32))
same = np.array_equal(signed, unsigned)
print(f"int8 activations:                 {signed_ms:.2f} ms")
print(f"uint8, moved by 128:              {unsigned_ms:.2f} ms, the same sums: {same}")
print(f"fp32:                             {float_ms:.2f} ms")
if not same:
    print("the unsigned product of this processor saturates: nothing to compare")
    sys.exit(2)
described = signed_ms > 4 * unsigned_ms and signed_ms > float_ms
print("as described" if described else "CHANGED")
sys.exit(0 if described else 1)
PY
