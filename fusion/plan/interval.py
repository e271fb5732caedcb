"""Intervals of sizes that share a plan: a size inside one is run by the kernel that was tuned for its upper end.

Source: our definition (the paper tunes every shape by itself).
"""

import functools
from dataclasses import replace

from fusion.plan.chain import Chain

SMALLEST = 16  # of the upper ends: a tile's least


def upper_end(size: int) -> int:
    """The end of the interval that a size is in: 16, 32, 48, 64, 96, 128, 192 and so on, two for each doubling.

    Args:
        size: Of a dimension.

    Source: our definition.
    """
    end = SMALLEST
    while end < size:
        if end * 3 // 2 >= size and end > SMALLEST:
            return end * 3 // 2
        end *= 2
    return end


@functools.lru_cache(maxsize=1024)  # asked at every call, and to make a chain is to verify it
def interval(chain: Chain) -> Chain:
    """The chain whose plan another one shares: every loop at the upper end of its interval, every batch too.

    Args:
        chain: With the sizes at hand.

    Source: our definition.
    """
    dims = tuple(replace(dim, size=_batch_end(dim.size) if dim.batch else upper_end(dim.size)) for dim in chain.dims)
    return replace(chain, dims=dims)


def _batch_end(size: int) -> int:
    return 1 if size <= 1 else 1 << (size - 1).bit_length()
