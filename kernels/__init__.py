"""The place of the GPU kernels; there are none yet.

This folder is installed as `activedpo_fast.kernels`. Today every operation runs through the C++ of
csrc/ (CPU tensors) or the PyTorch definitions of activedpo_fast/reference.py (any device);
`activedpo_fast.ops.backends()` tells which.
"""
