"""Torch twins: one file per op, the definition every other backend is held against."""
