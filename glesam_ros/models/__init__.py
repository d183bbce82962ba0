"""Models behind one interface a kind; a new model is one file and one line in `registry.py`."""

from glesam_ros.models.base import (
    Budget,
    Candidates,
    Embedding,
    OutOfMemory,
    RestorerModel,
    SegmentationModel,
    SemanticModel,
)
from glesam_ros.models.registry import (
    load_model,
    load_restorer_model,
    load_semantic_model,
    model_names,
    register_model,
    register_restorer,
    register_semantic,
    restorer_names,
    semantic_names,
)

__all__ = [
    "Budget", "Candidates", "Embedding", "OutOfMemory", "RestorerModel", "SegmentationModel", "SemanticModel",
    "load_model", "load_restorer_model", "load_semantic_model", "model_names", "register_model", "register_restorer",
    "register_semantic", "restorer_names", "semantic_names",
]
