#!/usr/bin/env bash
# ONNX Runtime, session.x64quantprecision: it also changes products on processors that need no such help.
#
# Expected: the option makes products of uint8 and int8 exact on x86 without VNNI, where they saturate in 16 bits; its
# description speaks of such processors alone. With VNNI nothing changes.
# Seen: with VNNI the sums are the same, and MatMulInteger and QLinearConv take more than four times as long: weights
# become unsigned there as well.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0
"$folder/venv/bin/python" - <<'PY'
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

if not {"avx512_vnni", "avx_vnni"} & set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split()):
    print("this processor has no VNNI: nothing to see")
    sys.exit(2)
random = np.random.default_rng(0)
OPTION = "session.x64quantprecision"


def initializer(name: str, array: np.ndarray):
    return numpy_helper.from_array(array, name)


def session(node, source: list[int], result: list[int], kind: int, initializers: list, exact: bool):
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, source)],
        [helper.make_tensor_value_info("y", kind, result)],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    if exact:
        options.add_session_config_entry(OPTION, "1")
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def compare(name: str, *arguments) -> float:
    """Times a node without and with the option; the factor between them."""
    sessions = {exact: session(*arguments, exact) for exact in (False, True)}
    x = random.integers(0, 256, arguments[1], np.uint8)
    times = {exact: [] for exact in sessions}
    outputs = {}
    for _ in range(30):
        for exact, run in sessions.items():
            start = time.perf_counter()
            outputs[exact] = run.run(None, {"x": x})[0]
            times[exact].append(1000 * (time.perf_counter() - start))
    plain, changed = min(times[False]), min(times[True])
    same = np.array_equal(outputs[False], outputs[True])
    print(f"{name}: {plain:.2f} ms, with {OPTION}=1 {changed:.2f} ms: {changed / plain:.1f}; the same numbers: {same}")
    if not same:
        sys.exit(1)
    return changed / plain


print(f"onnxruntime {ort.__version__}, one thread")
product = compare(
    "MatMulInteger, [288, 384] x [384, 2048]",
    helper.make_node("MatMulInteger", ["x", "w", "zero"], ["y"]),
    [288, 384],
    [288, 2048],
    TensorProto.INT32,
    [initializer("w", random.integers(-127, 128, (384, 2048), np.int8)), initializer("zero", np.array(128, np.uint8))],
)
scale, zero = np.array(0.05, np.float32), np.array(128, np.uint8)
convolution = compare(
    "QLinearConv, 64 to 64 channels, 3x3, 128x128",
    helper.make_node("QLinearConv", ["x", "s", "z", "w", "ws", "wz", "s", "z"], ["y"], pads=[1, 1, 1, 1]),
    [1, 64, 128, 128],
    [1, 64, 128, 128],
    TensorProto.UINT8,
    [
        initializer("s", scale),
        initializer("z", zero),
        initializer("w", random.integers(-127, 128, (64, 64, 3, 3), np.int8)),
        initializer("ws", np.full(64, 0.002, np.float32)),
        initializer("wz", np.zeros(64, np.int8)),
    ],
)
described = product > 1.3 and convolution > 1.3
print("as described" if described else "CHANGED")
sys.exit(0 if described else 1)
PY
