#!/usr/bin/env bash
# Tests of the TensorRT backends that need a GPU, in one command: builds zimage-nano in fp16 for this machine's own
# GPU, runs the tests that need one, then compares the images with ONNX Runtime's on 20 prompts and times them.
#
#   tests/hardware/tensorrt_gpu.sh tensorrt|tensorrt_rtx [OUT]
#
# Needs a supported GPU (tensorrt: Ampere or later; tensorrt_rtx: any GeForce or RTX card, no Hopper) and the package:
# pip install -e '.[onnxruntime,cli,export,dev,tensorrt]' (or tensorrt-rtx). PYTHON names another interpreter.
set -uo pipefail

backend=${1:-}
if [[ $backend != tensorrt && $backend != tensorrt_rtx ]]; then
  sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
root=$(cd "$(dirname "$0")/../.." && pwd)
out=${2:-$root/out/$backend}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
cd "$root" || exit 1
python=${PYTHON:-$root/.venv/bin/python}
[[ -x $python ]] || python=python3

fail() {
  echo "FAILED: $*" >&2
  exit 1
}

# The GPU's compute capability in the format of --sm, or an error.
sm=$("$python" -c '
import sys
from zimage_rt.backends.nvidia_driver import query
driver = query()
if driver.problem:
    sys.exit(driver.problem)
print("{}{}".format(*driver.devices[0].compute_capability))
') || fail "no GPU to run on"

bundle=$out/nano-fp16-$backend
reference=$out/nano-fp32
export_command=("$python" -m zimage_rt.export.cli)
[[ -f $reference/manifest.json ]] ||
  "${export_command[@]}" engines/nano.toml --out "$reference" --skip-parity || fail "exporting the reference"
echo "== building $bundle for sm_$sm"
start=$SECONDS
"${export_command[@]}" engines/nano-rtx-fp16.toml --out "$bundle" --backend "$backend" --sm "$sm" --skip-parity ||
  fail "building the plans"
echo "== built in $((SECONDS - start)) s: $(du -ch "$bundle"/*.engine | tail -n 1 | cut -f 1) of plans"

"$python" -m pytest -q -p no:cacheprovider -rs tests/backends/test_tensorrt_gpu.py || fail "the tests on a GPU"

set -o pipefail
"$python" tests/hardware/tensorrt_parity.py --backend "$backend" --bundle "$bundle" --reference "$reference" \
  --json "$out/$backend.json" | tee "$out/$backend.md" || fail "parity"
echo "== the tables are in $out/$backend.md"
