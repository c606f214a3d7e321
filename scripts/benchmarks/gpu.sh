#!/usr/bin/env bash
# Benchmarks on one GPU of a machine without network, where data arrive in parts.
#
#   scripts/benchmarks/gpu.sh keep FOLDER...         # take in parts: data sets and weights, and wheels to install
#   scripts/benchmarks/gpu.sh features SUITE SIZE... # features of CIFAR-10N for all runs of a suite
#   scripts/benchmarks/gpu.sh runs SUITE SECONDS [PATTERN...]   # runs of suites/SUITE.yaml, as many as fit
#   scripts/benchmarks/gpu.sh seeds SUITE SECONDS SEED...       # more seeds, each method at the rate that it chose
#   scripts/benchmarks/gpu.sh tests SECONDS          # pytest -m gpu
#   scripts/benchmarks/gpu.sh cost SECONDS           # what a step costs, in bfloat16
#   scripts/benchmarks/gpu.sh frozen SECONDS         # ways to run a frozen backbone
#   scripts/benchmarks/gpu.sh all                    # tests, cost, frozen and the suite scratch, in 13 minutes
#
# KEEP (/tmp/hnml) keeps data, packages and finished runs between calls; records are copied to OUT after every call.
# JOBS (8) runs share the device, at the same time where CUDA's multi-process service is at hand and by turns otherwise.
# MINIATURE=1 makes every run a few steps of a small network, to try the script on a CPU.
set -uo pipefail
cd "$(dirname "$0")/../.."
KEEP=${KEEP:-/tmp/hnml} OUT=${OUT:-/tmp/hnml-records} JOBS=${JOBS:-8}
mkdir -p "$KEEP/data" "$KEEP/site" "$KEEP/runs" "$KEEP/mps" "$OUT"
export PYTHONPATH="$PWD:$KEEP/site${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 HF_HOME="$KEEP/hf" TOKENIZERS_PARALLELISM=false
export HF_DATASETS_DISABLE_PROGRESS_BARS=1 CUDA_MPS_PIPE_DIRECTORY="$KEEP/mps" CUDA_MPS_LOG_DIRECTORY="$KEEP/mps"
smaller=() steps=(--device cuda --bf16 --channels_last --batch_size 128) device=cuda
if [ -n "${MINIATURE:-}" ]; then
  smaller=(--override max_steps=2 image_size=64 per_device_train_batch_size=16 use_cpu=true resident=true)
  steps=(--device cpu --batch_size 4 --memory_batch_size 4 --steps 1 --warmup 1 --rounds 1) device=cpu
fi

records() {
  for folder in "$KEEP"/runs/*/; do cp "$folder/runs.jsonl" "$OUT/$(basename "$folder").runs.jsonl" 2>/dev/null; done
}

share() {  # let runs use the device at the same time
  [ ! -e "$KEEP/mps/tried" ] || return 0
  touch "$KEEP/mps/tried"
  if command -v nvidia-cuda-mps-control > /dev/null; then
    nvidia-cuda-mps-control -d
    timeout 40 python3 -c 'import torch; torch.ones(2, 2).cuda().sum().item()' && echo "runs share the device" && return 0
    echo quit | timeout 10 nvidia-cuda-mps-control
  fi
  echo "runs take turns on the device"
}

suite() {  # SUITE SECONDS [PATTERN...]
  local name=$1 seconds=$2 only=()
  shift 2
  [ $# -eq 0 ] || only=(--only "$@")
  share
  timeout -k 10 "$seconds" python3 scripts/benchmarks/benchmark.py accuracy --suite "scripts/benchmarks/suites/$name.yaml" \
    --work_dir "$KEEP/runs/$name" --jobs "$JOBS" --threads 2 "${smaller[@]}" "${only[@]}" 2>&1 | tail -n 60
}

features() {  # SUITE SIZE...: where a run looks for them, in a folder beside its own
  local name=$1 waited=0
  shift
  for size in "$@"; do
    python3 scripts/benchmarks/shared_features.py data/cifar10n "$size" "$KEEP/runs/$name/features" &
  done
  for job in $(jobs -p); do wait "$job" || waited=$?; done
  return $waited
}

[ -e data ] || ln -s "$KEEP/data" data
[ -e outputs ] || ln -s "$KEEP/runs" outputs  # a run may start from the weights of another one
task=${1:-} start=$SECONDS
[ $# -eq 0 ] || shift
case $task in
  keep)
    for part in "$@"; do
      [ ! -d "$part/data" ] || cp -r "$part/data/." "$KEEP/data/"
      [ ! -d "$part/wheels" ] || python3 -m pip install -q --no-index --no-deps --target "$KEEP/site" "$part"/wheels/*.whl
    done
    du -sh "$KEEP/data"/* ;;
  features) features "$@" ;;
  runs) suite "$@" ;;
  seeds)
    name=$1 seconds=$2
    shift 2
    readarray -t chosen < <(python3 scripts/benchmarks/chosen_rates.py "$KEEP/runs/$name/runs.jsonl" "$@")
    suite "$name" "$seconds" "${chosen[@]}" ;;
  tests) timeout -k 10 "$1" python3 -m pytest -q -p no:cacheprovider -m gpu $(grep -rl "mark.gpu" tests) 2>&1 \
    | tee "$OUT/tests.txt" | tail -n 20 ;;
  cost)
    timeout -k 10 "$1" python3 scripts/benchmarks/benchmark.py cost "${steps[@]}" \
      --output "$OUT/cost-cuda-resnet18-32.json" 2>&1 | tail -n 30 ;;
  frozen)
    timeout -k 10 "$1" python3 docs/results/frozen-pass-cuda.py data/weights/tf_efficientnet_lite0.in1k.safetensors $device \
      | tee "$OUT/frozen-pass-cuda.json" ;;
  all)  # what fits into a quarter of an hour, the most needed first
    failed=0 script=scripts/benchmarks/gpu.sh
    bash "$script" tests 120 || failed=$?
    bash "$script" cost 120 || failed=$?
    bash "$script" frozen 60 || failed=$?
    bash "$script" runs scratch 480 || failed=$?
    exit $failed ;;
  *) echo "$0: '$task' is no task; see the first lines of this file"; exit 2 ;;
esac
code=$?
records
echo "$task ended with $code after $((SECONDS - start)) s"
exit $code
