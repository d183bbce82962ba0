"""The ROS 2 layer: messages in, messages out; lifecycle, threads, QoS, parameters and diagnostics."""

from glesam_ros import keep_openblas_on_one_thread

keep_openblas_on_one_thread()
