"""Triton kernels, installed as fda_fast.kernels: one file per op, kernels and their launchers."""
