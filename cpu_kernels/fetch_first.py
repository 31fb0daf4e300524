"""What a thread does before its first tile, when it first asks for the weights of that tile: they come meanwhile."""

from __future__ import annotations

from cpu_kernels.compile import call_kernel, kernel, unpack

WORDS = 3
"""Arguments before those of the two kernels."""


@kernel("fetch first")
def fetch_first(arguments, tile, thread):
    """Runs two kernels: their addresses and the number of the first one's arguments, then the arguments of both."""
    fetch, maker, words = unpack(arguments, "iii")
    call_kernel(fetch, arguments + 8 * WORDS, tile, thread)
    call_kernel(maker, arguments + 8 * (WORDS + words), tile, thread)
