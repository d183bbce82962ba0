#!/usr/bin/env bash
# Make the virtual environment .venv of this repository: ROS 2 from PyPI, the package, vision_msgs.
#
#   bash scripts/setup.sh               what is needed to run
#   bash scripts/setup.sh test train    and these extras of setup.py
#   bash scripts/setup.sh glesam        and SAM, SAM 2 and GleSAM at full size
#   GPU=1 bash scripts/setup.sh         onnxruntime for CUDA and TensorRT instead of the CPU one, the newest torch;
#                                       GPU=0 goes back
#   DISTRO=kilted bash scripts/setup.sh   the environment .venv-kilted, with ROS 2 Kilted; else it is Jazzy
#
# torch from PyPI brings gigabytes of CUDA on Linux. Where pip knows PyTorch's own index for CPUs, too
# (PIP_EXTRA_INDEX_URL), it takes the small build from there.
# Done already: nothing happens. PYTHON=/path/to/python3.11 chooses the interpreter.
set -euo pipefail

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$repository"
# a sourced ROS workspace is made for another Python, and would win over what is installed here
unset PYTHONPATH AMENT_PREFIX_PATH LD_LIBRARY_PATH _ROS_WHEELS_BOOTSTRAP_COMPLETE

fail() {
  printf 'setup: %s\n' "$@" >&2
  exit 1
}

case "${DISTRO:=jazzy}" in
  jazzy) venv="$repository/.venv" ros=ros ;;
  kilted) venv="$repository/.venv-kilted" ros=ros-kilted ;;
  *) fail "expected DISTRO jazzy or kilted (PyPI has no other), got $DISTRO" ;;
esac
extras="cli,$ros"
for extra in "$@"; do extras+=",$extra"; done
sources=(setup.py setup.cfg pyproject.toml scripts/setup.sh scripts/build_vision_msgs.sh scripts/vision_msgs/msg/*.msg)
# once made for a GPU it stays so: demo.sh and test.sh do not ask for one
if [ -z "${GPU:-}" ] && grep -qs ' GPU=1 ' "$venv/.setup"; then GPU=1; fi
state_of() { echo "$1 GPU=${GPU:-0} $(cat "${sources[@]}" | cksum)"; }
state="$(state_of "$extras")"
if [ -x "$venv/bin/python" ] && grep -qsxF -- "$state" "$venv/.setup"; then
  exit 0
fi

python="${PYTHON:-$(command -v python3.11 || true)}"
[ -n "$python" ] || fail "expected Python 3.11 (the ROS wheels are made for it), found no python3.11 on the PATH" \
  "on Debian 12: sudo apt-get install python3.11-venv python3.11-dev; else: https://www.python.org, pyenv or uv"
version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
[ "$version" = 3.11 ] || fail "expected Python 3.11 (the ROS wheels are made for it), $python is $version"

if [ ! -x "$venv/bin/python" ]; then
  "$python" -m venv "$venv" || fail "python3.11 -m venv failed; on Debian: sudo apt-get install python3.11-venv"
fi
echo "setup: installing glesam_ros[$extras] into ${venv##*/} (a few minutes on the first run)"
install() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
wants() { [[ ",$extras," == *,$1,* ]]; }
pins=()
if [ "${GPU:-0}" != 1 ]; then
  # the ones that were tested, and that fit each other
  if wants glesam || wants train; then pins+=(torch==2.13.0); fi
  if wants glesam; then pins+=(torchvision==0.28.0); fi
fi
if [ "${GPU:-0}" != 1 ] && compgen -G "$venv/lib/python*/site-packages/onnxruntime_gpu-*" >/dev/null; then
  # of a set-up for a GPU: both packages own the same folder
  "$venv/bin/python" -m pip uninstall --quiet --yes onnxruntime onnxruntime-gpu
fi
install --editable ".[$extras]" "${pins[@]}"
# sam2 is built with the torch that is there, isolated it would download one of its own; older setuptools need wheel
if wants glesam; then
  install "setuptools>=71"
  SAM2_BUILD_CUDA=0 install --no-build-isolation sam2==1.1.0
fi
if [ "${GPU:-0}" = 1 ]; then
  # both packages own the same folder, so one has to go first
  "$venv/bin/python" -m pip uninstall --quiet --yes onnxruntime onnxruntime-gpu
  install onnxruntime-gpu
fi
bash scripts/build_vision_msgs.sh "$venv"
# what was set up with more extras serves those who need none
printf '%s\n' "$(state_of "cli,$ros")" "$state" >"$venv/.setup"
echo "setup: done, $(du -sh "$venv" | cut -f1) in ${venv##*/}"
