"""LQSeg data sets on disk: clear pictures, their degraded versions and their masks, from annotated sources."""
