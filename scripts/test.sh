#!/usr/bin/env bash
# Lint, type check and all tests, in .venv; every skipped test is listed with its reason.
#
#   bash scripts/test.sh [options of pytest]      for example: bash scripts/test.sh -k prompts
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# a sourced ROS workspace is made for another Python, and would win over what is installed here
unset PYTHONPATH AMENT_PREFIX_PATH LD_LIBRARY_PATH _ROS_WHEELS_BOOTSTRAP_COMPLETE
bash scripts/setup.sh test train glesam
export PATH="$PWD/.venv/bin:$PATH"
# the graph of the tests stays on this machine
export ROS_AUTOMATIC_DISCOVERY_RANGE="${ROS_AUTOMATIC_DISCOVERY_RANGE:-LOCALHOST}"

failed=()
step() {
  printf '\n== %s\n' "$*"
  "$@" || failed+=("$1 ($?)")
}
step ruff check .
step mypy
step python scripts/generate_parameters.py --check
step python -m pytest "$@"

if [ ${#failed[@]} -gt 0 ]; then
  printf '\nFAILED: %s\n' "${failed[*]}"
  exit 1
fi
printf '\nall passed\n'
