#!/bin/sh
# Every stage in order: ./run.sh gpu (one data-centre GPU, under half an hour) or ./run.sh cpu (an hour on two cores).
# A stage whose result is in state/ already is not run again; delete the file to repeat it.
set -eu
cd "$(dirname "$0")"
mkdir -p state
case "${1:-}" in
gpu)
    device=cuda
    scenes=400000 variants=6
    tiny="--seconds 95"
    joint="--text-seconds 60 --seconds 900 --batch 768"
    decoders="--seconds 120"
    whole="--seconds 60 --crop 256 --batch 24 --lr 3e-4"
    ;;
cpu)
    device=cpu
    # Without these, glibc hands every large tensor back to the system, which takes longer than the arithmetic.
    export MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=200000000000
    scenes=40000 variants=4
    tiny="--seconds 1800 --batch 16 --crop 64"
    joint="--text-seconds 270 --text-batch 128 --seconds 2050 --batch 32 --tokens 112 --lr 1e-3 --ema 0.995"
    decoders="--seconds 250 --batch 16 --crop 64 --lr 2e-3"
    whole="--seconds 170 --crop 256 --batch 2 --lr 1e-3"
    ;;
*)
    echo "usage: $0 gpu|cpu" >&2
    exit 2
    ;;
esac
[ -d node_modules ] || npm install @iconify-json/noto@1.2.9 @iconify-json/fluent-emoji-flat@1.2.6
[ -f state/atlas.npz ] || python drawings.py --npm node_modules --out state/atlas.npz
[ -f state/corpus.npz ] || python corpus.py --scenes $scenes --variants $variants --out state/corpus.npz
common="--atlas state/atlas.npz --work state --device $device"
[ -f state/vaes.pt ] || python vaes.py tiny $common $tiny
[ -f state/average.pt ] || python train.py $common --corpus state/corpus.npz $joint
if [ ! -f state/vaes.json ]; then
    python vaes.py decoders $common $decoders
    # The full VAE normalises over the whole picture: it must have seen whole pictures.
    python vaes.py decoders $common $whole
fi
python assemble.py --work state --out ../zimage-nano
python heldout.py --atlas state/atlas.npz --out ../../benchmarks/quality/data
