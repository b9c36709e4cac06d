"""Layers as four-sweep programs, and the autograd engine."""
