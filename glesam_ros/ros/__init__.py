"""The ROS 2 layer: messages in, messages out; lifecycle, threads, QoS, parameters and diagnostics."""

import os

# before numpy is loaded: idle threads of OpenBLAS spin, on cores that onnxruntime and the robot need
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
