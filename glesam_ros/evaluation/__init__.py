"""Evaluation: masks against truth, baselines, figures and pictures of the result."""

MAX_MASKS = 100
"""How many masks the larger average recall takes; here, where the command's help reads it without loading the rest."""
