#!/usr/bin/env bash
# All that a GPU can tell of this project, within eight minutes on an H100 or H200: `make gpu`, or
#
#   benchmarks/gpu.sh [--rehearse] [STEP ...]        all steps, or these: smoke tests step op drift graph
#
# A step that fails or takes too long does not stop the next, and makes the exit code 1. Each has a log in
# ${OUT:-gpu-results}; its records (benchmarks/measure/records.py), and one of the step itself, are added to results.jsonl
# there, and a table on the screen sums them up, which `python -m benchmarks gpu FOLDER` prints again. --rehearse runs the
# same steps in small without a GPU, the kernels in Triton's interpreter: whether all of it works.
# It needs torch, torchvision and pytest, and installs nothing.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
out=${OUT:-gpu-results}
rehearse=""
if [ "${1:-}" = --rehearse ]; then
  rehearse=1
  shift
fi
steps="smoke tests step op drift graph"
wanted=" ${*:-$steps} "
for name in $wanted; do
  if [[ " $steps " != *" $name "* ]]; then
    echo "There is no step $name: the steps are $steps" >&2
    exit 2
  fi
done
# One host, and no more threads than help; kernels are compiled anew, as on a user's first day
export PYTHONUNBUFFERED=1 PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=2 GLOO_SOCKET_IFNAME=lo NCCL_SOCKET_IFNAME=lo KINETO_LOG_LEVEL=99
machine=$("$python" -m benchmarks.measure.machine) || exit 1
if [[ "$machine" == *'"gpu": null'* ]] && [ -z "$rehearse" ]; then
  echo "There is no GPU here. The same steps run in small without one: make gpu ARGS=--rehearse" >&2
  exit 2
fi
mkdir -p "$out"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export TRITON_CACHE_DIR="$scratch/triton"
pytest=("$python" -m pytest -p no:cacheprovider --tb=short)
"$python" -c 'import xdist' 2> /dev/null && spread=(-n 8) || spread=()
failed=0

# NAME LIMIT_S COMMAND ...: run it, keep what it says in NAME.log, and behind its records one of how it ended
step() {
  local name=$1 limit_s=$2 began=$SECONDS code
  shift 2
  [[ "$wanted" == *" $name "* ]] || return 0
  timeout -k 5 "$limit_s" "$@" > "$out/$name.log" 2>&1
  code=$?
  [ "$code" = 0 ] || failed=1
  printf '{"benchmark": "gpu", "table": "steps", "parameters": {}, "case": {"step": "%s"}, "figures": {"code": %d, "seconds": %d, "limit_s": %d}, %s, "date": "%s"}\n' \
    "$name" "$code" "$((SECONDS - began))" "$limit_s" "${machine:1:-1}" "$(date -u +%FT%T+00:00)" >> "$out/results.jsonl"
  echo "$name: $([ "$code" = 0 ] && echo ok || echo "exit code $code") after $((SECONDS - began)) s of $limit_s"
}

measure=("$python" -m benchmarks)
keep=(--json "$out/results.jsonl")
[ $# -gt 0 ] || : > "$out/results.jsonl"
if [ -z "$rehearse" ]; then
  step smoke 50 "${measure[@]}" smoke "${keep[@]}"
  step tests 140 "${pytest[@]}" "${spread[@]}" --maxfail=25 \
    tests/op/test_kernels.py tests/op/test_gpu.py tests/drift/test_gpu.py tests/benchmarks/test_step.py
  step step 140 "${measure[@]}" step --images 32 8 --compile --seconds 3 "${keep[@]}"
  step op 50 "${measure[@]}" op_gpu --cases few --seconds 0.4 "${keep[@]}"
  step drift 35 "${measure[@]}" drift_cost --device cuda --model resnet50 --size 224 --turns 7 "${keep[@]}"
  step graph 45 "${pytest[@]}" tests/trainer/test_gpu.py -k "rounding and plain and sgd and 1"
else
  export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES=""
  small=(--device cpu --model resnet18 --images 2 --size 64)
  step smoke 120 "${measure[@]}" smoke --device cpu "${keep[@]}"
  step tests 300 "${pytest[@]}" tests/op/test_kernels.py tests/op/test_gpu.py tests/drift/test_gpu.py \
    tests/benchmarks/test_step.py -k "rows or planes or gpu or torchs"
  step step 300 "${measure[@]}" step "${small[@]}" --seconds 0.1 --layer-images 2 "${keep[@]}"
  step op 60 "${measure[@]}" op_gpu --device cpu --seconds 0.1 "${keep[@]}"
  step drift 120 "${measure[@]}" drift_cost "${small[@]}" --turns 2 --steps 2 "${keep[@]}"
  step graph 60 "${pytest[@]}" tests/trainer/test_gpu.py
fi
"${measure[@]}" gpu "$out"
exit "$failed"
