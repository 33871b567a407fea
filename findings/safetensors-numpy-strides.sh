#!/usr/bin/env bash
# safetensors: `safetensors.numpy.save_file` ignores the strides of an array.
#
# Expected: the stored tensor equals the array, or an error says that it is not contiguous (as safetensors.torch does).
# Seen: a transposed or sliced array is stored as the first bytes of its buffer under the array's own shape.
# `numpy.ascontiguousarray` before saving avoids it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.4.6 safetensors==0.8.0
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import importlib.metadata
import sys

import numpy as np
from safetensors.numpy import load_file, save_file

print(f"safetensors {importlib.metadata.version('safetensors')}, numpy {np.__version__}")
array = np.arange(6, dtype=np.float32).reshape(2, 3)
cases = {
    "transposed": (array.T, False),
    "columns 1 and 2": (array[:, 1:], False),
    "transposed, contiguous": (np.ascontiguousarray(array.T), True),
}
same = True
for name, (value, expected) in cases.items():
    save_file({"x": value}, "x.safetensors")
    stored = load_file("x.safetensors")["x"]
    equal = bool(np.array_equal(value, stored))
    print(f"{name:<23} saved {value.tolist()}, read back {stored.tolist()}: {'equal' if equal else 'NOT EQUAL'}")
    same = same and equal is expected
print("as described" if same else "CHANGED")
sys.exit(0 if same else 1)
PY
