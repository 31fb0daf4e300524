"""Triton kernels for NVIDIA GPUs, each with its Python wrapper and a twin in plain torch.

`launch.py` says what they need, `lists.py` how selections lie in memory, `pack.py` how weights do, `tune.py` how a tile
is chosen. With TRITON_INTERPRET=1 in the environment, before Triton is imported, all of them run on a CPU.
"""
