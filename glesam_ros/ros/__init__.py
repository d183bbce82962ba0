"""The ROS 2 layer: messages in, messages out; lifecycle, threads, QoS, parameters and diagnostics."""
