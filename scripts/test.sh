#!/usr/bin/env bash
# Lint, type check and all tests, in .venv; every skipped test is listed with its reason.
#
#   bash scripts/test.sh [options of pytest]      for example: bash scripts/test.sh -k prompts
#   DISTRO=kilted bash scripts/test.sh [...]      the tests of the node alone, with ROS 2 Kilted, in .venv-kilted
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# a sourced ROS workspace is made for another Python, and would win over what is installed here
unset PYTHONPATH AMENT_PREFIX_PATH LD_LIBRARY_PATH _ROS_WHEELS_BOOTSTRAP_COMPLETE
export DISTRO="${DISTRO:-jazzy}"
if [ "$DISTRO" = jazzy ]; then
  venv=.venv
  bash scripts/setup.sh test train glesam
else
  venv=".venv-$DISTRO"
  bash scripts/setup.sh test
  set -- test/test_executor.py test/test_node_*.py test/test_demo.py "$@"
fi
export PATH="$PWD/$venv/bin:$PATH"
# the graph of the tests stays on this machine
export ROS_AUTOMATIC_DISCOVERY_RANGE="${ROS_AUTOMATIC_DISCOVERY_RANGE:-LOCALHOST}"

failed=()
step() {
  printf '\n== %s\n' "$*"
  "$@" || failed+=("$1 ($?)")
}
if [ "$DISTRO" = jazzy ]; then
  step ruff check .
  step mypy
  step python scripts/generate_parameters.py --check
fi
step python -m pytest "$@"

if [ ${#failed[@]} -gt 0 ]; then
  printf '\nFAILED: %s\n' "${failed[*]}"
  exit 1
fi
printf '\nall passed\n'
