"""What `tools.count_kernels` is made of."""
