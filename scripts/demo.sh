#!/usr/bin/env bash
# The main job with one command: perception node, demo camera, a live line of rates, overlay pictures.
#
#   bash scripts/demo.sh [options of `glesam demo`]      for example: bash scripts/demo.sh --help
set -euo pipefail

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# a sourced ROS workspace is made for another Python, and would win over what is installed here
unset PYTHONPATH AMENT_PREFIX_PATH LD_LIBRARY_PATH _ROS_WHEELS_BOOTSTRAP_COMPLETE
DISTRO=jazzy bash "$repository/scripts/setup.sh"
export PATH="$repository/.venv/bin:$PATH"
exec glesam demo "$@"
