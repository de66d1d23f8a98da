#!/usr/bin/env bash
# All cases of the benchmark on several GPUs, most important first. A case that fails or hangs stops no other.
#
#   benchmarks/multi_gpu_all.sh FOLDER [CASE[+CASE...] ...]   FOLDER/CASE.json and FOLDER/CASE.log, a table at the end
#
# Cases joined by "+" boot side by side and measure one after the other: they must fit into the memory together. Two GPUs
# of 141 GB are enough for the default list. CASE_LIMIT_S (default 170) bounds one case; LIMIT_S (default: none) all:
# what would begin later is left out. TINY=1 takes tiny shapes and gloo on a CPU: a dry run.
# Run it in the repository's root, in an environment with torch, vLLM and megatron-core ($PYTHON, default python3).
set -uo pipefail
folder=${1:?usage: benchmarks/multi_gpu_all.sh FOLDER [CASE[+CASE...] ...]}
shift
mkdir -p "$folder" && folder=$(cd "$folder" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
source examples/setup/env.sh
source benchmarks/end_processes.sh
export PYTHONUNBUFFERED=1 VLLM_WORKER_MULTIPROC_METHOD=spawn VLLM_USE_DEEP_GEMM=0
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1 # for whoever forgets
python=${PYTHON:-python3}
dense=qwen2.5-7b moe=qwen3-30b-a3b small=qwen3-moe-small dry=()
[ -z "${TINY:-}" ] || { dense=tiny moe=qwen3-moe-tiny small=qwen3-moe-tiny dry=(--simulate); }
limit=${CASE_LIMIT_S:-170} # s

arguments() { # of a case: number of trainer ranks, then the script and its options
  case $1 in
    b7) echo "1 multi_gpu.py broadcast --shape $dense" ;;
    p7) echo "1 multi_gpu_peer.py --shape $dense" ;;
    f) echo "2 multi_gpu_faults.py --shape $small" ;;
    c7) echo "2 multi_gpu.py colocated --shape $dense" ;;
    s7) echo "2 multi_gpu.py stages --shape $dense" ;;
    r7) echo "2 multi_gpu.py reshard --shape $dense" ;;
    b30) echo "1 multi_gpu.py broadcast --shape $moe" ;;
    p30) echo "1 multi_gpu_peer.py --shape $moe --repeat 3 --repeat-unpacked 0" ;;
    c30) echo "2 multi_gpu.py colocated --shape $moe --ep 2 --paths direct" ;;
    r30) echo "2 multi_gpu.py reshard --shape $moe --ep 2" ;;
    q7) echo "4 multi_gpu.py broadcast --shape $dense --tp 2 --pp 2 --trainer-gpus 0,1,2,3 --engine-gpus 4,5;6,7" ;;
    q30) echo "8 multi_gpu.py stages --shape $moe --tp 2 --pp 2 --ep 2 --trainer-gpus 0,1,2,3,4,5,6,7 --engine-gpus 4,5;6,7" ;;
    v7) echo "2 multi_gpu.py broadcast --shape $dense --tp 2 --trainer-gpus 0,1 --engine-gpus 2,3" ;;
    *) return 1 ;;
  esac
}

run_case() {
  local name=$1 line words ranks options command started mark status
  line=$(arguments "$name") || { echo "no case $name" >&2; return; }
  read -r -a words <<<"$line"
  ranks=${words[0]} options=("benchmarks/${words[1]}" "${words[@]:2}" "${dry[@]}" --json "$folder/$name.json")
  command=("$python")
  [ "$ranks" = 1 ] || command+=(-m torch.distributed.run --standalone --nproc-per-node "$ranks")
  command+=("${options[@]}")
  rm -f "$folder/$name.json"
  started=$SECONDS mark=$name-$$
  MBRIDGE_BENCH_CASE=$mark MBRIDGE_BENCH_NAME=$name VLLM_ALLOW_INSECURE_SERIALIZATION=1 \
    timeout -k 10 "$limit" "${command[@]}" >"$folder/$name.log" 2>&1 </dev/null
  status=$?
  end_processes "$mark"
  [ -z "${MBRIDGE_BENCH_TURNS:-}" ] || rm -f "$MBRIDGE_BENCH_TURNS/$name.waits"
  echo "case $name: status $status, $((SECONDS - started)) s: ${command[*]}"
  [ $status = 0 ] || grep -v 'WARNING\|FutureWarning' "$folder/$name.log" | tail -n 6 | cut -c1-300
}

[ $# -gt 0 ] || set -- b7+p7 b30 p30 c7+s7+r7 f c30
for wave in "$@"; do
  if [ -n "${LIMIT_S:-}" ] && [ $SECONDS -ge "$LIMIT_S" ]; then echo "left out, $SECONDS s have passed: $wave"; continue; fi
  IFS=+ read -r -a names <<<"$wave"
  if [ ${#names[@]} = 1 ]; then run_case "${names[0]}"; continue; fi
  MBRIDGE_BENCH_TURNS=$(mktemp -d) && export MBRIDGE_BENCH_TURNS
  for name in "${names[@]}"; do touch "$MBRIDGE_BENCH_TURNS/$name.waits"; done
  for name in "${names[@]}"; do run_case "$name" & done
  wait
  rm -rf "$MBRIDGE_BENCH_TURNS"
  unset MBRIDGE_BENCH_TURNS
done
"$python" benchmarks/multi_gpu_summary.py "$folder"
