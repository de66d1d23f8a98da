#!/usr/bin/env bash
# All cases of the GPU benchmark, one after the other, most important first. A case that fails or hangs stops no other.
#
#   benchmarks/gpu_all.sh FOLDER [CASE ...]    writes FOLDER/CASE.json and FOLDER/CASE.log, prints a summary at the end
#
# Run it in the repository's root, in an environment with torch, vLLM and megatron-core ($PYTHON, default python3).
# One H200 is enough for each. CASE_LIMIT_S (default 170) bounds one case, half as much again the peers. Without CASE:
# all but those marked (*), which measure alone what another case measures too, or one more shape. TINY=1 takes tiny
# shapes: a dry run on a CPU.
set -uo pipefail
folder=${1:?usage: benchmarks/gpu_all.sh FOLDER [CASE ...]}
shift
mkdir -p "$folder" && folder=$(cd "$folder" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
source examples/setup/env.sh
source benchmarks/end_processes.sh
export PYTHONUNBUFFERED=1 VLLM_WORKER_MULTIPROC_METHOD=spawn VLLM_USE_DEEP_GEMM=0
python=${PYTHON:-python3}
dense=qwen2.5-7b small=qwen2.5-0.5b llama=llama-3.1-8b moe=qwen3-30b-a3b latent=deepseek-v3-slice
[ -z "${TINY:-}" ] || { dense=tiny small=tiny llama=tiny moe=qwen3-moe-tiny latent=deepseek-v3-tiny; }
soak=${SOAK:-1000} limit=${CASE_LIMIT_S:-170} # s; half as much again for the peers

arguments() { # of a case: number of trainer ranks (0: peers), then what refit_gpu.py gets
  case $1 in
    a) echo "1 --shape $dense --paths direct,bucket --verify --keep --soak $soak" ;;
    b) echo "1 --shape $moe --paths direct,bucket --verify" ;;
    c) echo "0 --shape $dense" ;;
    d) echo "2 --shape $moe --tp 2 --ep 2 --paths direct --verify" ;;
    f) echo "0 --shape $moe" ;;
    g) echo "1 --shape $latent --paths direct,bucket --verify" ;;
    h) echo "1 --shape $small --engine graphs --paths direct,bucket --verify" ;;
    d4) echo "4 --shape $moe --tp 2 --ep 2 --etp 2 --paths direct --verify" ;;
    i) echo "1 --shape $llama --paths direct,bucket --verify" ;;
    j) echo "1 --shape $small --quantization fp8 --paths direct,bucket --verify" ;;
    m) echo "2 --shape $dense --tp 2 --paths direct,bucket --verify" ;;
    e) echo "1 --shape $moe --paths bucket" ;;                # (*)
    k) echo "1 --shape $dense --paths direct --keep" ;;       # (*)
    l) echo "1 --shape $dense --paths direct --soak $soak" ;; # (*)
    n) echo "0 --shape $llama" ;;                             # (*)
    *) return 1 ;;
  esac
}

run_case() {
  local name=$1 line words ranks options command launch started mark status
  line=$(arguments "$name") || { echo "no case $name" >&2; return; }
  read -r -a words <<<"$line"
  ranks=${words[0]} options=("${words[@]:1}" --json "$folder/$name.json")
  if [ "$ranks" = 0 ]; then
    command=("$python" benchmarks/refit_gpu_peers.py "${options[@]}")
  elif [ "$ranks" = 1 ]; then
    command=("$python" benchmarks/refit_gpu.py "${options[@]}")
  else
    launch=("$python" -m torch.distributed.run --standalone --nproc-per-node "$ranks")
    command=("${launch[@]}" benchmarks/refit_gpu.py "${options[@]}")
  fi
  rm -f "$folder/$name.json"
  started=$SECONDS mark=$name-$$
  MBRIDGE_BENCH_CASE=$mark MBRIDGE_BENCH_NAME=$name VLLM_ALLOW_INSECURE_SERIALIZATION=$((ranks == 0)) \
    timeout -k 10 "$((limit * (ranks == 0 ? 3 : 2) / 2))" "${command[@]}" >"$folder/$name.log" 2>&1 </dev/null
  status=$?
  end_processes "$mark"
  [ -z "${MBRIDGE_BENCH_TURNS:-}" ] || rm -f "$MBRIDGE_BENCH_TURNS/$name.waits"
  echo "case $name: status $status, $((SECONDS - started)) s: ${command[*]}"
  [ $status = 0 ] || tail -n 5 "$folder/$name.log" | cut -c1-300
}

[ $# -gt 0 ] || set -- a b c d f g h i j m d4
if [ -n "${TOGETHER:-}" ]; then # boot side by side, measure one after the other: they must all fit into the memory
  MBRIDGE_BENCH_TURNS=$(mktemp -d) && export MBRIDGE_BENCH_TURNS
  for name in "$@"; do touch "$MBRIDGE_BENCH_TURNS/$name.waits"; done
  for name in "$@"; do run_case "$name" & done
  wait
  rm -rf "$MBRIDGE_BENCH_TURNS"
else
  for name in "$@"; do run_case "$name"; done
fi
"$python" benchmarks/summary.py "$folder"
