#!/usr/bin/env bash
# Set-up if needed, then the tests. Without arguments: ruff and mypy first, then the whole suite, fast tests first.
#   bash tests/run.sh [pytest arguments, paths from the repository root]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash examples/setup/setup.sh
source .venv/bin/activate
source examples/setup/env.sh
if (($# == 0)); then
  ruff check --quiet --output-format concise .
  ruff format --check --quiet . || { echo "run.sh: some files are not formatted; run: ruff format ." >&2; exit 1; }
  mypy
  set -- -n 2  # two test files' worth of processes at a time
fi
exec python -m pytest "$@"
