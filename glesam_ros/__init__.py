"""GleSAM for robots: masks from cameras when the picture is bad.

>>> from glesam_ros import load_pipeline
>>> pipe = load_pipeline("nano", enhancement="auto")
>>> instances = pipe.segment(image)  # image: (H, W, 3) uint8 RGB
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glesam_ros.identity import IdKeeper
    from glesam_ros.instances import Instances
    from glesam_ros.pipeline import EnhancementGate, Pipeline, load_pipeline
    from glesam_ros.semantic import SemanticMap, load_restorer, load_semantic
    from glesam_ros.settings import Settings

__version__ = "0.1.0"
__all__ = [
    "EnhancementGate", "IdKeeper", "Instances", "Pipeline", "SemanticMap", "Settings", "load_pipeline", "load_restorer",
    "load_semantic",
]

_HOMES = {
    "EnhancementGate": "pipeline", "IdKeeper": "identity", "Instances": "instances", "Pipeline": "pipeline",
    "SemanticMap": "semantic", "Settings": "settings", "load_pipeline": "pipeline", "load_restorer": "semantic",
    "load_semantic": "semantic",
}


def keep_openblas_on_one_thread() -> None:
    """Set `OPENBLAS_NUM_THREADS` to 1 where it is not set, for a whole program: call it before numpy is loaded.

    Idle threads of OpenBLAS spin, on cores that onnxruntime and the robot need.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def __getattr__(name: str) -> Any:
    # on first use: `glesam --help` and the launch file need neither numpy nor OpenCV
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
