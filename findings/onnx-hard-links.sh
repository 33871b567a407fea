#!/usr/bin/env bash
# onnx: `onnx.load` refuses a model whose external weights have more than one hard link.
#
# Expected: a file is the same under any of its names; caches, backups and `cp -l` make second links.
# Seen: ValidationError "… has multiple hard links, indicating a potential hardlink attack". Loading works again as soon
# as the second name is gone, or if the weights are a copy.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.4.6 onnx==1.23.2
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import os
import sys

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

weights = numpy_helper.from_array(np.arange(256, dtype=np.float32).reshape(16, 16), "w")
x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 16]) for name in "xy")
graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weights])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
onnx.save(model, "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)


def loads() -> str:
    try:
        onnx.load("m.onnx")
    except onnx.checker.ValidationError as error:
        return f"{type(error).__name__}: {error}".replace(os.getcwd(), "…")
    return "loads"


print(f"onnx {onnx.__version__}")
one = loads()
os.link("w.bin", "second-name.bin")
two = loads()
os.unlink("second-name.bin")
again = loads()
for name, outcome in (("one link", one), ("two links", two), ("one link again", again)):
    print(f"{name:<15} {outcome}")
same = one == again == "loads" and "multiple hard links" in two
print("as described" if same else "CHANGED")
sys.exit(0 if same else 1)
PY
