"""The operations on NVIDIA GPUs: imported only for tensors on CUDA, and by the tests that interpret or compile.

No file here has run on a GPU. Block sizes were chosen from what the compiler reports for sm_80 and sm_90 (`compile.py`,
table in kernels/README.md), not from timings.
"""
