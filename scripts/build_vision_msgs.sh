#!/usr/bin/env bash
# Give a virtual environment with the ROS wheels the package vision_msgs, which has no wheel.
#
#   bash scripts/build_vision_msgs.sh [PREFIX]      PREFIX: the virtual environment, default .venv of the repository
#
# Nothing is built where `import vision_msgs.msg` works already, so an installed package (apt) wins. The generators live
# in a virtual environment of their own that is thrown away afterwards. Needs a C++ compiler and Python's headers;
# cmake comes from PyPI where it is missing.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
prefix="$(cd "${1:-"$here/../.venv"}" && pwd)"
python="$prefix/bin/python"
# guard of the wheels' start-up code: inherited from another environment, this one's libraries would not be found
unset _ROS_WHEELS_BOOTSTRAP_COMPLETE

if "$python" -c 'import vision_msgs.msg' 2>/dev/null; then
  echo "vision_msgs: present, nothing to build"
  exit 0
fi

fail() {
  printf 'vision_msgs cannot be built: %s\n' "$@" >&2
  exit 1
}
apt="on Debian and Ubuntu: sudo apt-get install g++ python3-dev"
compiler="${CXX:-$(command -v g++ || command -v clang++ || true)}"
[ -n "$compiler" ] || fail "no C++ compiler found (g++ or clang++); $apt"
headers="$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')"
[ -f "$headers/Python.h" ] || fail "Python.h is not in $headers (headers of $("$python" --version)); $apt"

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
echo "vision_msgs: building with the ROS generators (about a minute)"
"$python" -m venv "$work/venv"
build_python="$work/venv/bin/python"
# named one by one: the wheels do not declare what their CMake files look for
if compgen -G "$prefix/lib/python*/site-packages/ros_kilted_rclpy-*" >/dev/null; then
  distro=kilted own=ament-cmake-ros-core
else
  distro=jazzy own=python-cmake-module
fi
packages=(catkin_pkg numpy)
for name in ament-{package,cmake,cmake-ros,cmake-include-directories,cmake-gmock,cmake-gtest,cmake-pytest,cmake-python} \
  rosidl-{core-generators,default-generators,default-runtime} {geometry,std}-msgs "$own"; do
  packages+=("ros-$distro-$name")
done
command -v cmake >/dev/null || packages+=(cmake)
"$build_python" -m pip install --quiet --disable-pip-version-check "${packages[@]}"

# The wheels' CMake targets name the include folders of the machine they were built on; put this machine's in.
numpy_headers="$("$build_python" -c 'import numpy; print(numpy.get_include())')"
find "$work/venv/share" -name '*generator_pyExport.cmake' -exec sed -i -E \
  -e "s#/opt/python/[^;\"]*/numpy/_core/include#$numpy_headers#g" \
  -e "s#/opt/python/[^;\"]*/include/python[0-9.]+#$headers#g" {} +

export PATH="$work/venv/bin:$PATH"
export AMENT_PREFIX_PATH="$work/venv" CMAKE_PREFIX_PATH="$work/venv"
build() {
  cmake -S "$here/vision_msgs" -B "$work/build" -DCMAKE_BUILD_TYPE=Release -DCMAKE_INSTALL_PREFIX="$prefix" \
    -DCMAKE_CXX_COMPILER="$compiler" -DPython3_EXECUTABLE="$build_python" -DPYTHON_EXECUTABLE="$build_python" \
    -DBUILD_TESTING=OFF &&
    cmake --build "$work/build" --parallel "$(nproc)" &&
    cmake --install "$work/build"
}
if ! build >"$work/log" 2>&1; then
  tail -n 40 "$work/log" >&2
  fail "see the errors above"
fi
# serve no one at run time, and name the folder that goes away
rm -rf "$prefix/include/vision_msgs" "$prefix/share/vision_msgs/cmake" \
  "$prefix/share/ament_index/resource_index/parent_prefix_path/vision_msgs"
"$python" -c 'import vision_msgs.msg as m; m.Detection2DArray(); print("vision_msgs: installed in", m.__path__[0])'
