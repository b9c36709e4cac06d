"""Merge fine-tuned models through Functional Dual Anchors (arXiv 2510.21223)."""

__version__ = "0.1.0"
