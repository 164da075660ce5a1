"""Cumulative Spatial Knowledge Distillation (arXiv 2307.08500) from a teacher cache that is computed once."""

__version__ = "0.1.0"
