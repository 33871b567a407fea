#!/bin/sh
# Every stage in order: ./run.sh gpu (one data-centre GPU, about half an hour) or ./run.sh trial (every stage in miniature, on a CPU).
# A stage whose result is in state/ already is not run again; delete the file to repeat it.
set -eu
cd "$(dirname "$0")"
case "${1:-}" in
gpu)
    work=state device=cuda compile=blocks
    scenes=800000 variants=6
    vaes="--seconds 170" decoders="--seconds 400"
    text="--seconds 70 --batch 4096" joint="--seconds 800" turbo="--seconds 150" base="--seconds 200" judge="--each 200"
    loose=300000
    ;;
trial)
    work=state-trial device=cpu compile=none
    # Without these, glibc hands every large tensor back to the system, which takes longer than the arithmetic.
    export MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=200000000000
    export NANO_SUBJECTS=12  # with fewer, no pair may have all that is the judge's
    scenes=4000 variants=3
    vaes="--seconds 10 --batch 2 --crop 64 --measure 16" decoders="$vaes"
    text="--seconds 10 --batch 16" joint="--seconds 10 --batch 2" turbo="--seconds 10 --batch 2" base="--seconds 10 --batch 2" judge="--each 2 --batch 2"
    loose=$scenes
    ;;
*)
    echo "usage: $0 gpu|trial" >&2
    exit 2
    ;;
esac
mkdir -p $work
[ -d node_modules ] || npm install @iconify-json/noto@1.2.9 @iconify-json/fluent-emoji-flat@1.2.6
[ -f $work/atlas.npz ] || python drawings.py --npm node_modules --out $work/atlas.npz
[ -f $work/corpus.npz ] || python corpus.py --scenes $scenes --variants $variants --out $work/corpus.npz
python heldout.py --atlas $work/atlas.npz --out $work/quality-data
drawn="--atlas $work/atlas.npz --work $work --device $device"
told="--corpus $work/corpus.npz --work $work --device $device --compile $compile"
[ -f $work/vaes.pt ] || python vaes.py joint $drawn $vaes
[ -f $work/text.pt ] || python train.py text $told $text
[ -f $work/average.pt ] || python train.py joint $told --atlas $work/atlas.npz $joint
[ -f $work/turbo.pt ] || python turbo.py $told --atlas $work/atlas.npz $turbo
[ -f $work/corpus-loose.npz ] || python corpus.py --loose 0.6 --scenes $loose --variants 4 --out $work/corpus-loose.npz
[ -f $work/base.pt ] || python base.py --corpus $work/corpus-loose.npz --work $work --device $device --compile $compile --atlas $work/atlas.npz $base
[ -f $work/decoders ] || { python vaes.py decoders $drawn $decoders && touch $work/decoders; }
python judge_fast.py --work $work --data $work/quality-data --device $device --model turbo $judge
python assemble.py --work $work --out $work/zimage-nano
