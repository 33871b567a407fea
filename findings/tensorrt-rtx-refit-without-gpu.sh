#!/usr/bin/env bash
# TensorRT-RTX: with no GPU, builds with REFIT or STRIP_PLAN fail for every network that has a matrix product.
#
# Expected: they build ahead of time for a named compute capability, as the same network does without those flags.
# Seen: build_serialized_network returns None; the log says that a CUDA call failed in the code generator. A network
# without a matrix product builds with either flag.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.4.6 tensorrt-rtx-cu13==1.7.1.116
"$folder/venv/bin/python" - <<'PY'
import sys
from pathlib import Path

import numpy as np
import tensorrt_rtx as trt

print(f"tensorrt_rtx {trt.__version__}")
if Path("/dev/nvidiactl").exists():
    print("this machine has an NVIDIA GPU: nothing to see here")
    sys.exit(2)


class Log(trt.ILogger):
    """Keeps the errors."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []

    def log(self, severity: trt.ILogger.Severity, message: str) -> None:
        if severity <= trt.Logger.ERROR:
            self.errors.append(message)


log = Log()
WEIGHTS = np.ones((16, 16), np.float32)


def builds(kind: str, flag: str | None) -> bool:
    builder = trt.Builder(log)
    network = builder.create_network(0)
    x = network.add_input("x", trt.float32, (1, 16))
    if kind == "matrix product":
        weights = network.add_constant((16, 16), trt.Weights(WEIGHTS)).get_output(0)
        none = trt.MatrixOperation.NONE
        y = network.add_matrix_multiply(x, none, weights, none).get_output(0)
    else:
        y = network.add_activation(x, trt.ActivationType.RELU).get_output(0)
    network.mark_output(y)
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    if flag is not None:
        config.set_flag(getattr(trt.BuilderFlag, flag))
    return builder.build_serialized_network(network, config) is not None


same = True
for kind in ("ReLU", "matrix product"):
    for flag in (None, "REFIT", "STRIP_PLAN"):
        expected = kind == "ReLU" or flag is None
        built = builds(kind, flag)
        print(f"{kind:<15} {flag or 'no flag':<10} {'builds' if built else 'fails'}")
        same = same and built is expected
print(f"the log's first error: {log.errors[0] if log.errors else 'none'}")
print("as described" if same else "CHANGED")
sys.exit(0 if same else 1)
PY
