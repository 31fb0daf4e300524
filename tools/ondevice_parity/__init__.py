"""One case table for the kernels of all homes, against NumPy in float64: `ondevice doctor --parity`."""
