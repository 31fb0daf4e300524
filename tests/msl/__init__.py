"""Metal kernels without a Mac: their exact text is compiled by clang and run on a CPU, and everything is checked.

How to use it:

1. A test takes the fixture `metal`: `mx.fast.metal_kernel` is the emulator then (on a Mac: the GPU). Wrappers must look
   `mx.fast.metal_kernel` up when called and keep what it made in a function with `functools.cache`, in `metal_kernels`.
2. `for _ in metal.schedules(): ...` repeats with threads run forward, in reverse, and at random with seeds.
3. A kernel that does wrong raises `tests.msl.findings.KernelError`: its `kinds` say what, the message says where.
4. `metal.ran("name")` says how often a kernel ran; `metal.runs[-1]` has the generated text and counts.
5. Mutants: see `tests.msl.mutants`.
"""
