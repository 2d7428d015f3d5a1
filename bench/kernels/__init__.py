"""The kernels against PyTorch's own and against what the machine can do; one file an operation."""
