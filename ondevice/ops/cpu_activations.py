"""Numbers of the activation functions, as `cpu_kernels.rows.activate` knows them."""

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3, "abs": 4, "none": 5}
