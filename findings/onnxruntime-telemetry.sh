#!/usr/bin/env bash
# onnxruntime: importing the Linux wheel keeps a device id and a queue of events for Microsoft in the home folder.
#
# Expected: the documentation speaks of telemetry on Windows alone, and of a function that turns it off.
# Seen: with 1.32.0, an import and a session leave ~/.cache/Microsoft/DeveloperTools/.onnxruntime/{deviceid,onnxruntime.db};
# `disable_telemetry_events()` comes too late for that. ORT_DISABLE_TELEMETRY=1 before the import leaves nothing. Whether
# anything is sent is not looked at here.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q onnxruntime==1.32.0 numpy==2.4.6 onnx==1.23.2
cat >"$folder/session.py" <<'PY'
import sys

import onnxruntime
from onnx import TensorProto, helper

if "call" in sys.argv:
    onnxruntime.disable_telemetry_events()
x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
PY
"$folder/venv/bin/python" -c 'import onnxruntime; print("onnxruntime", onnxruntime.__version__)'

files() {
  rm -rf "$folder/home"
  mkdir "$folder/home"
  env -u XDG_CACHE_HOME HOME="$folder/home" "$@" >/dev/null 2>&1
  (cd "$folder/home" && find . -type f | sort | tr '\n' ' ')
}
plain=$(files "$folder/venv/bin/python" "$folder/session.py")
call=$(files "$folder/venv/bin/python" "$folder/session.py" call)
variable=$(files env ORT_DISABLE_TELEMETRY=1 "$folder/venv/bin/python" "$folder/session.py")
echo "as it is:                       ${plain:-nothing}"
echo "disable_telemetry_events():     ${call:-nothing}"
echo "ORT_DISABLE_TELEMETRY=1:        ${variable:-nothing}"
if [[ $plain == *deviceid* && $call == *deviceid* && -z $variable ]]; then
  echo "as described"
else
  echo "CHANGED"
  exit 1
fi
