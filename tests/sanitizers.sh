#!/usr/bin/env bash
# The tests of _core under AddressSanitizer and UBSan. The module is built into a copy of the package, so that the
# installed one is not changed.
#
#   tests/sanitizers.sh [PYTHON]
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
python=$(realpath -s "${1:-$root/.venv/bin/python}")
build=$root/build/sanitizers
cd "$root"
rm -rf "$build/site"
mkdir -p "$build/site"
cp -r zimage_rt "$build/site/"
rm -f "$build"/site/zimage_rt/*.so
cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS=-O1 -DZIMAGE_RT_WERROR=ON \
  -DCMAKE_MAKE_PROGRAM="$(dirname "$python")/ninja" -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" \
  -DPython_EXECUTABLE="$python" -DZIMAGE_RT_CUDA=OFF -DZIMAGE_RT_SANITIZE=address,undefined \
  -DZIMAGE_RT_OUTPUT="$build/site/zimage_rt" >"$build/log"
"$python" -m cmake --build "$build" >>"$build/log" || {
  tail -n 40 "$build/log"
  exit 1
}

# No leak check, because Python frees memory late. Runs in another folder, because Python imports from its own first.
export LD_PRELOAD="$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$build/site
cd "$build"
"$python" -c "import zimage_rt._core as core; assert core.__file__.startswith('$build'), core.__file__"
"$python" -m pytest -q -p no:cacheprovider -c "$root/pyproject.toml" "$root/tests/native/test_core.py" "$root/tests/sampling/test_samplers.py" \
  "$root/tests/native/test_fuzz_native.py"
