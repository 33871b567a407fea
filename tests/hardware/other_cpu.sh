#!/usr/bin/env bash
# A subset of the CPU tests under other instruction sets, emulated by Debian's `qemu-user` (apt-get install qemu-user):
# numpy, ONNX Runtime and torch choose their kernels by CPUID, and sum in another order. Each model draws images, which the
# judge must pass, and runs the tests that compare numbers with torch's and diffusers'. Emulation is some fifty times
# slower than the processor itself, so that CI does not run this. The wheels of numpy 2.4 and ONNX Runtime 1.32 do not
# start on Nehalem (SSE 4.2) there: Sandy Bridge is the oldest model.
#
#   tests/hardware/other_cpu.sh [MODEL...]     qemu's names; SandyBridge (AVX) and Haswell (AVX2, FMA) if none is given
set -uo pipefail

cd "$(dirname "$0")/../.." || exit 1
python=${PYTHON:-.venv/bin/python}
models=${*:-SandyBridge Haswell}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
failed=()
export PYTHONPATH=tests/helpers
# No tests with processes of their own, which would not be emulated.
tests=(tests/native/test_core.py tests/sampling/test_samplers.py)
picked="randn or guidance or loop_equals or diffusers or same_end or schedule"

command -v qemu-x86_64 >/dev/null || { echo "no qemu-x86_64: apt-get install qemu-user" >&2; exit 2; }
[[ -f engines/nano/manifest.json ]] || { echo "no engines/nano: run \`make bundle\` first" >&2; exit 2; }

echo "== this processor"
"$python" tests/hardware/other_cpu.py draw "$out/here.npz" &&
  "$python" tests/hardware/other_cpu.py judge "$out/here.npz" "$out/here.npz" || failed+=("this processor")
for model in $models; do
  start=$SECONDS
  echo "== $model: images"
  qemu-x86_64 -cpu "$model" "$python" tests/hardware/other_cpu.py draw "$out/$model.npz" &&
    "$python" tests/hardware/other_cpu.py judge "$out/$model.npz" "$out/here.npz" || failed+=("$model: images")
  echo "== $model: tests"
  OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 qemu-x86_64 -cpu "$model" \
    "$python" -m pytest -q -p no:cacheprovider "${tests[@]}" -k "$picked" || failed+=("$model: tests")
  echo "== $model: $((SECONDS - start)) s"
done

if ((${#failed[@]})); then
  printf 'failed: %s\n' "${failed[@]}"
  exit 1
fi
echo "all passed: $models"
