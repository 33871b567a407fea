#!/usr/bin/env bash
# ONNX Runtime, default thread count: worker threads are pinned to cores outside the process's affinity mask.
#
# Expected: threads stay on the cores that sched_setaffinity (taskset, a cpuset, a batch system) allows.
# Seen: with intra_op_num_threads = 0 each worker is pinned by core number, so a process that may use core 0 alone gets
# workers on cores 1, 2, …. Setting the thread count explicitly avoids the pinning, and then the mask is inherited.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0
"$folder/venv/bin/python" - <<'PY'
import os
import sys

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

cores = sorted(os.sched_getaffinity(0))
print(f"onnxruntime {ort.__version__}, cores {cores}")
if len(cores) < 2:
    print("one core: nothing to see here")
    sys.exit(2)
allowed = {cores[0]}
os.sched_setaffinity(0, allowed)

border = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [64, 64]) for name in "xy"]
graph = helper.make_graph([helper.make_node("MatMul", ["x", "x"], ["y"])], "g", border[:1], border[1:])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def threads() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/task")}


def workers(count: int) -> list[set[int]]:
    """The allowed cores of each thread that a session with this thread count starts."""
    before = threads()
    options = ort.SessionOptions()
    options.intra_op_num_threads = count
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    session.run(None, {"x": np.ones((64, 64), np.float32)})
    return [os.sched_getaffinity(thread) for thread in threads() - before]


default, explicit = workers(0), workers(2)
print(f"process may use {allowed}")
print(f"workers, default thread count: {default}")
print(f"workers, thread count 2:       {explicit}")
pinned_outside = any(not mask <= allowed for mask in default)
inherits = bool(explicit) and all(mask <= allowed for mask in explicit)
print("as described" if pinned_outside and inherits else "CHANGED")
sys.exit(0 if pinned_outside and inherits else 1)
PY
