#!/usr/bin/env bash
# The whole job on the embedded tiny world: data, encoder, three stages, scores, curves. No GPU; about ten minutes.
#   bash speedrun.sh [--seed=7] [--n_thread=2]      run again, it skips what is finished and resumes what broke
set -euo pipefail
cd "$(dirname "$0")"
seed=7 options=()
for arg in "$@"; do
    case $arg in
        --seed=*) seed=${arg#--seed=} ;;
        --n_thread=*) options+=("$arg") ;;
        *) echo "$arg: expected --seed=N or --n_thread=N"; exit 1 ;;
    esac
done
out=out/tiny
[ "$seed" = 7 ] || out=out/tiny_$seed
stage() { command python3 "$1" "$2" config/tiny.py --seed="$seed" "${options[@]}" "${@:3}"; }
begin=$SECONDS
say() { printf '\n=== %s (%d s since the start)\n' "$1" $((SECONDS - begin)); }
python() { command python3 "$@"; }

say '1/6 tiny world: text, captions, instructions, benchmarks'
[ -e data/tiny/world.json ] || python tinyworld.py data
say '2/6 encoder: a small SigLIP'
[ -e data/tiny/encoder/config.json ] || python tinyworld.py encoder
say '3/6 stage 1: text, checkpoints at 20, 40, 60, 80 and 100 %'
stage pretrain.py config/text.py --out_dir="$out/text"
say '4/6 stage 2: the 80 % checkpoint goes on with 10 % images'
stage pretrain.py config/ckpt80_img10.py --init_from="$out/text/ckpt_080" --out_dir="$out/ckpt80_img10"
say '5/6 stage 3: instruction fine-tuning'
stage finetune.py config/finetune.py --init_from="$out/ckpt80_img10/ckpt_100" --out_dir="$out/finetune"
say '6/6 scores'
for ckpt in text/ckpt_020 text/ckpt_040 text/ckpt_060 text/ckpt_080 text/ckpt_100 ckpt80_img10/ckpt_100 finetune/ckpt_100; do
    case $ckpt in
        text/*) tasks=reading,facts ;;
        ckpt80_img10/*) tasks=reading,facts,captions ;; # it has not learned to answer questions about images yet
        *) tasks= ;;                                    # all that a fine-tuned model can be asked
    esac
    if [ -e "$out/$ckpt/eval/table.txt" ]; then
        cat "$out/$ckpt/eval/table.txt"
    else
        python evaluate.py config/tiny.py "${options[@]}" --ckpt="$out/$ckpt" --tasks="$tasks"
    fi
done
say 'done: a page of the answers, every score so far, the training curves'
python report.py "$out/finetune/ckpt_100"
python report.py "$out/text" "$out/ckpt80_img10" "$out/finetune"
image=data/tiny/eval/val2014/COCO_val2014_000000000000.jpg
printf '\nAsk it (more in README.md, "Ask it"):\n    %s --image=%s --prompt="what is at a2?"\n' \
    "python evaluate.py config/tiny.py --ckpt=$out/finetune/ckpt_100" "$image"
