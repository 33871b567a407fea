#!/usr/bin/env bash
# The figures of int8 and fp8 on an NVIDIA GPU: products and their errors, evaluations beside bf16 and hand-fused torch in
# fp8, parity per block at full size, and the judge's figures of zimage-nano. Needs the package built with
# ZIMAGE_RT_CUDA=ON (CONTRIBUTING.md), torch, 45 GB of disk and a device with 60 GB or more. Each part takes less than
# eight minutes on an H100. `depth` (all layers from token ids to pixels, no verdict) runs on request.
#
#   tests/hardware/eight_bits_gpu.sh [OUT] [PART...]     parts: products evaluation parity judge depth
#
# PYTHON names another interpreter, BUNDLES the folder of random bundles, JUDGED the precisions that are judged.
set -uo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
out=${1:-gpu-results}
shift || true
parts=${*:-products evaluation parity judge}
python=${PYTHON:-python3}
bundles=${BUNDLES:-/tmp/zimage-random-bundles}
mkdir -p "$out" "$bundles"
out=$(cd "$out" && pwd)
cd "${WORKDIR:-$root}" || exit 1
source "$root/tests/hardware/run_parts.sh"

benchmark=("$python" -m)
for part in $parts; do
  case $part in
    products)
      run errors "${benchmark[@]}" zimage_rt.benchmarks.quantized_products --errors --json "$out/product-errors.json"
      run products "${benchmark[@]}" zimage_rt.benchmarks.quantized_products --json "$out/products.json"
      run products-1152 "${benchmark[@]}" zimage_rt.benchmarks.quantized_products --rows 1152 \
        --json "$out/products-1152.json"
      ;;
    evaluation)
      run evaluation "${benchmark[@]}" zimage_rt.benchmarks.eight_bits --sizes 1024,512 --bundles "$bundles" \
        --json "$out/eight-bits.json"
      ;;
    parity)
      for outliers in "" --outliers; do
        run "parity$outliers" "${benchmark[@]}" zimage_rt.benchmarks.full_size_parity --precisions int8,fp8 \
          --refiner-layers 0 --skip-end-to-end $outliers --json "$out/parity-8bit$outliers.json"
      done
      ;;
    depth)
      run depth "${benchmark[@]}" zimage_rt.benchmarks.full_size_parity --precisions int8,fp8 --skip-modules \
        --json "$out/parity-8bit-depth.json"
      ;;
    judge)
      for precision in ${JUDGED:-int8 fp8}; do
        bundle=$bundles/zimage-nano-$precision
        # The weight files of `zimage-export`, byte for byte.
        [[ -f $bundle/manifest.json ]] || run "bundle-$precision" "${benchmark[@]}" zimage_rt.benchmarks.random_bundle \
          "$bundle" --checkpoint checkpoints/zimage-nano --precision "$precision" --device cpu
        run "judge-$precision" "${benchmark[@]}" zimage_rt.benchmarks.quality --system zimage_rt --bundle "$bundle" \
          --backend cuda --each 500 --beside benchmarks/results/quality-diffusers-h100.json \
          --json "$out/quality-cuda-$precision.json"
      done
      ;;
    *)
      echo "no part is called $part" >&2
      exit 2
      ;;
  esac
done

end_parts
