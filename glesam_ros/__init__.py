"""GleSAM for robots: masks from cameras when the picture is bad.

>>> from glesam_ros import load_pipeline
>>> pipe = load_pipeline("nano", enhancement="auto")
>>> instances = pipe.segment(image)  # image: (H, W, 3) uint8 RGB
"""

from glesam_ros.instances import Instances
from glesam_ros.pipeline import EnhancementGate, Pipeline, load_pipeline
from glesam_ros.settings import Settings

__version__ = "0.1.0"
__all__ = ["EnhancementGate", "Instances", "Pipeline", "Settings", "load_pipeline"]
