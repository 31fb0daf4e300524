"""int8 codes of the activations of chosen neurons, which lie side by side without the others."""

from __future__ import annotations

from cpu_kernels.codes import quantize_rows
from cpu_kernels.compile import kernel, unpack
from cpu_kernels.entries import entry_count


@kernel("quantize chosen")
def quantize_chosen(arguments, tile, thread):
    """A thread's own codes of one token.

    Its arguments: table, activations, neurons of the whole layer, panel and bytes between the panels of threads.
    """
    table, h, neurons, panel, each = unpack(arguments, "iiiii")
    quantize_rows(h, 0, 1, panel + thread * each, 32 * entry_count(table), 1, neurons)
