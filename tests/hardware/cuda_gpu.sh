#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one command: kernels, engine, compute-sanitizer, parity at full size,
# and the table of benchmarks/README.md. Needs the package built with ZIMAGE_RT_CUDA=ON (CONTRIBUTING.md), about 60 GB of
# disk and a device with 60 GB or more. By default all parts run except for `profile`.
#
#   tests/hardware/cuda_gpu.sh [OUT] [PART...]     parts: kernels engine sanitizer parity latency vae features profile
set -uo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
out=${1:-gpu-results}
shift || true
parts=${*:-kernels engine sanitizer parity latency vae features}
python=${PYTHON:-python3}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "${WORKDIR:-$root}" || exit 1
source "$root/tests/hardware/run_parts.sh"

kernels=(tests/backends/test_cuda_elementwise.py tests/backends/test_cuda_samplers.py tests/backends/test_cuda_gemm.py tests/backends/test_cuda_quantized.py tests/backends/test_cuda_attention.py tests/backends/test_cuda_conv.py tests/backends/test_cuda_full_vae_kernels.py)
engine=(tests/backends/test_cuda_loading.py tests/backends/test_cuda_engine.py tests/backends/test_cuda_features.py tests/backends/test_cuda_controlnet.py tests/backends/test_cuda_full_vae.py tests/backends/test_cuda_streaming.py)
pytest=("$python" -m pytest -q -p no:cacheprovider --tb=short)

for part in $parts; do
  case $part in
    kernels) run kernels "${pytest[@]}" "${kernels[@]}" ;;
    engine) run engine "${pytest[@]}" "${engine[@]}" ;;
    sanitizer)
      # Sizes that take the tools minutes and show nothing the others do not are left out, and with racecheck cuBLASLt's
      # own kernels, where it crashed when tried. A file at a time, so that a crash hides nothing of the others.
      for tool in memcheck racecheck; do
        for file in "${kernels[@]}"; do
          skip=()
          [[ $tool == racecheck ]] && skip=(--deselect tests/backends/test_cuda_gemm.py::test_gemm)
          run "sanitizer-$tool-$(basename "$file" .py)" compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "${pytest[@]}" -x "$file" "${skip[@]}" \
            -k "not 4224 and not 1500 and not 512 and not many and not 3840 and not 10240 and not 2560"
        done
      done
      ;;
    parity) run parity "$python" -m zimage_rt.benchmarks.full_size_parity --json "$out/parity.json" ;;
    latency) run latency "$python" -m zimage_rt.benchmarks.latency --device cuda --json "$out/h200.json" ;;
    vae) run vae "$python" -m zimage_rt.benchmarks.full_vae --portable --json "$out/full-vae.json" ;;
    features)
      bundle=${BUNDLE:-/tmp/zimage-random-bundles/full-bf16}  # what `latency` wrote
      run features "$python" -m zimage_rt.benchmarks.feature_cost "$bundle" --backend cuda --size 1024 \
        --json "$out/h200-features.json"
      run lora "$python" -m zimage_rt.benchmarks.lora_swap "$bundle" --backend cuda --rank 32 --json "$out/h200-lora.json"
      ;;
    profile) run profile "$python" -m zimage_rt.benchmarks.profile ;;
    *)
      echo "no part is called $part" >&2
      exit 2
      ;;
  esac
done

end_parts
