#!/usr/bin/env bash
# What ranking again by all layers of a language model gains over recipe default, in at most LIMIT_S seconds of a GPU.
#
#     bash benchmarks/gpu_cross_encoder.sh OUTPUT NAME=DATASET...
#     bash benchmarks/gpu_cross_encoder.sh runs/gpu beauty=runs/beauty/dataset industrial=runs/industrial/dataset
#
# One seed of every data set comes first, then the next seed. OUTPUT/NAME-SEED.json has the results: gains with paired
# intervals, tokens, processor seconds. The same command goes on where an earlier one stopped. Exit code 3 says that
# there is more to do.
#   LIMIT_S     seconds, 700 by default
#   SEEDS       number of seeds, 3 by default
#   TRAINING    options of llmgr_rec.train, none by default
#   OPTIONS     options of benchmarks.cross_encoder, by default all layers of smollm2 on the GPU
#   PYTHON      interpreter, python by default
set -u
if [ $# -lt 2 ] || [[ $2 != *=* ]]; then
    echo "usage: bash benchmarks/gpu_cross_encoder.sh OUTPUT NAME=DATASET..." >&2
    exit 2
fi
output=$1
shift
# shellcheck source-path=SCRIPTDIR
. "$(dirname "$0")/within_limit.sh"
options=${OPTIONS:---device cuda --layers 0 --sessions 20000 --batch 64 --candidates 20}

for ((seed = 0; seed < ${SEEDS:-3}; seed++)); do
    for named in "$@"; do
        run=$output/${named%%=*}-$seed
        dataset=${named#*=}
        if [ ! -d "$run/export/sbr" ]; then
            # The options are words.
            # shellcheck disable=SC2046,SC2086
            within_limit llmgr_rec.train --dataset "$dataset" --output "$run" --seed "$seed" \
                $([ -d "$run" ] && echo --resume) ${TRAINING:-}
        fi
        # shellcheck disable=SC2086
        within_limit benchmarks.cross_encoder --run "$run" --dataset "$dataset" --work "$run-scores" \
            --output "$run.json" --seed "$seed" $options
    done
done
