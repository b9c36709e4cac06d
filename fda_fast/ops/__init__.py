"""Fused operations: one file per op; checks and backend choice."""
