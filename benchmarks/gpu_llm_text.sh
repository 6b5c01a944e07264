#!/usr/bin/env bash
# What recipe llm_text gains over recipe default, and what it costs, in at most LIMIT_S seconds of a GPU.
#
#     bash benchmarks/gpu_llm_text.sh OUTPUT NAME=DATASET...
#     bash benchmarks/gpu_llm_text.sh runs/gpu beauty=runs/beauty/dataset industrial=runs/industrial/dataset
#
# One seed of every data set comes first, then the next seed. OUTPUT/NAME/gpu_llm_text.json has the results of the seeds
# that are complete: means with intervals, paired gains, training seconds. The same command goes on where an earlier one
# stopped. Exit code 3 says that there is more to do.
#   LIMIT_S     seconds, 700 by default
#   SEEDS       number of seeds, 3 by default
#   EXPERIMENT  experiment file, gpu_llm_text.yaml beside this script by default
#   PYTHON      interpreter, python by default
set -u
if [ $# -lt 2 ] || [[ $2 != *=* ]]; then
    echo "usage: bash benchmarks/gpu_llm_text.sh OUTPUT NAME=DATASET..." >&2
    exit 2
fi
output=$1
shift
experiment=${EXPERIMENT:-$(dirname "$0")/gpu_llm_text.yaml}
# shellcheck source-path=SCRIPTDIR
. "$(dirname "$0")/within_limit.sh"
seeds=""
for ((seed = 0; seed < ${SEEDS:-3}; seed++)); do
    seeds=${seeds:+$seeds,}$seed
    for named in "$@"; do
        within_limit llmgr_rec.experiments --experiment "$experiment" --dataset "${named#*=}" \
            --output "$output/${named%%=*}" --seeds "$seeds"
    done
done
