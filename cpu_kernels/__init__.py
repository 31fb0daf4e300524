"""Numba kernels for any CPU. Each file holds one idea; `compile.py` says how they are called and cached."""
