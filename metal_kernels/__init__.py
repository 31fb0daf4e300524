"""Metal kernels of the MLX runtime: `.metal` bodies, a Python wrapper for each, and a twin in plain MLX operations.

`launch.py` says what they need and how a body becomes a kernel, `lists.py` how selections lie in memory, `pack.py` how
weights do, `cache.py` how keys and values do. Names, arguments and results are those of `cuda_kernels`.
"""
