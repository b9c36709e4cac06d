"""CUDA C++: one file per op, over fda_fast._C."""
