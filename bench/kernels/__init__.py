"""The kernels against PyTorch's own operations and against the machine's limits; one file an operation."""
