"""Home of the Metal kernels of the MLX runtime: `.metal` bodies and the wrappers that hand them to MLX."""
