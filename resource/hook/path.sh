# `glesam` on the PATH of a shell that sourced the workspace
_colcon_prepend_unique_value PATH "$COLCON_CURRENT_PREFIX/lib/glesam_ros"
