#!/usr/bin/env bash
# Everything that a borrowed NVIDIA GPU is for, in about 14 minutes and offline: accuracy first, then speed.
#
#     benchmarks/gpu/run.sh cifar10-train.tar cifar10-test.tar RESULTS
#     benchmarks/gpu/run.sh --tiny cifar10-train.tar cifar10-test.tar RESULTS    # on a CPU: does it run?
#
# Results are written as they are made; the same call goes on from there. Not executed on a GPU yet.
set -euo pipefail
tiny=()
if [ "${1:-}" = --tiny ]; then tiny=(--tiny); shift; fi
if [ $# -ne 3 ]; then sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2; fi
train=$1 test=$2 results=$3
mkdir -p "$results"
python=${PYTHON:-python}

"$python" -m benchmarks.gpu.headline "${tiny[@]}" --data "$test" --train-data "$train" --minutes 8 --output "$results/headline.json"
"$python" -m benchmarks.gpu.sizes "${tiny[@]}" --minutes 4 --output "$results/sizes.json"
"$python" -m benchmarks.gpu.engines "${tiny[@]}" --data "$test" --train-data "$train" --output "$results/engines.json"
