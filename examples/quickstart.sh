#!/usr/bin/env bash
# The whole loop on this machine: set-up if needed, then GRPO with a TP=2 Megatron policy and a vLLM engine refitted after each step.
#   bash examples/quickstart.sh [--no-sync] [other arguments of quickstart.py]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/examples/setup/setup.sh"
source "$root/.venv/bin/activate"
source "$root/examples/setup/env.sh"
# --standalone takes a free port; the address is given because a machine's own name does not always resolve.
exec python -m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node 2 "$root/examples/quickstart.py" "$@"
