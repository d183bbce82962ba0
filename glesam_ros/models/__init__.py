"""Base models behind one interface; a new model is one file and one line in `REGISTRY`."""

from glesam_ros.models.base import Budget, Candidates, Embedding, OutOfMemory, SegmentationModel
from glesam_ros.models.registry import load_model, model_names, register_model

__all__ = [
    "Budget", "Candidates", "Embedding", "OutOfMemory", "SegmentationModel", "load_model", "model_names",
    "register_model",
]
