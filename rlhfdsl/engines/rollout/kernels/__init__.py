"""Triton kernels of a decode step. They need a CUDA device and are imported where there is one."""
