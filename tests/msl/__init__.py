"""Metal kernels without a Mac: their exact text is compiled by clang and run on a CPU, and everything is checked.

How to use it:

1. A test takes the fixture `metal`: `mx.fast.metal_kernel` is the emulator then (on a Mac: the GPU). Wrappers must look
   `mx.fast.metal_kernel` up when called and keep what it made in a function with `functools.cache`, in `metal_kernels`.
2. `for _ in metal.schedules(): ...` repeats with threads run forward, in reverse, and at random with seeds.
3. A kernel that does wrong raises `tests.msl.findings.KernelError`: its `kinds` say what, the message says where.
4. `metal.ran("name")` says how often a kernel ran; `metal.runs[-1]` has the generated text and counts.
5. Mutants: see `tests.msl.mutants`.

What can pass here and fail on a GPU: text that Apple's compiler refuses and clang does not (recursion, lambdas, goto);
more registers than there are; a function's last bits, as `fast::` is `precise::` and libm's; data handed from one
threadgroup to another by relaxed atomics, as runs here are sequentially consistent; arrays that begin at an address
that is not aligned for vectors, as slices of MLX's can. A row read past its end is a finding only where the array ends;
numbers show the rest.
"""
