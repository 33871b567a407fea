#!/usr/bin/env bash
# nvidia-cuda-nvcc: the nvcc of NVIDIA's wheels compiles, but cannot link a program.
#
# Expected: with its runtime's wheel beside it, `nvcc program.cu` gives a program, as the toolkit's nvcc does.
# Seen: nvcc.profile names lib64, and the wheels install libcudart_static.a and libcudadevrt.a into lib, so that the
# linker finds neither; CMake's test of the compiler fails by it. With -L…/lib it links. Needs g++; no GPU, no toolkit.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 \
  nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85
toolkit=$("$folder/venv/bin/python" -c 'import nvidia; print(list(nvidia.__path__)[0])')/cu13
nvcc=$toolkit/bin/nvcc
command -v g++ >/dev/null || { echo "no g++ on this machine"; exit 2; }
printf '#include <cstdio>\n__global__ void kernel() {}\nint main() { kernel<<<1, 1>>>(); std::puts("ran"); }\n' \
  >"$folder/program.cu"

"$nvcc" --version | grep release
echo "libraries: $(cd "$toolkit" && echo lib*/libcud*.a)"
grep 'LIBRARIES ' "$toolkit/bin/nvcc.profile"
"$nvcc" -arch=sm_90 -c "$folder/program.cu" -o "$folder/program.o" && echo "compiled"
if "$nvcc" -arch=sm_90 "$folder/program.cu" -o "$folder/program" 2>"$folder/stderr"; then
  echo "CHANGED: it links without help"
  exit 1
fi
grep 'cannot find' "$folder/stderr"
"$nvcc" -arch=sm_90 -L"$toolkit/lib" "$folder/program.cu" -o "$folder/program" && echo "with -L$(basename "$toolkit")/lib it links"
[[ -x $folder/program ]] && echo "as described"
