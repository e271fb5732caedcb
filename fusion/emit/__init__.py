"""A schedule as text: pure functions from (chain, schedule) to the source of a kernel, in Triton or in C++.

tiles, arithmetic -> softmax, causal -> statements -> nest -> triton; cpp

    tiles.py       a tile's variables, addresses and masks
    arithmetic.py  the stages between products, line by line
    softmax.py     in place, or online
    causal.py      the rounds of a loop that a causal mask leaves nothing of
    statements.py  load, compute, finish and store a tile
    nest.py        loops
    triton.py      the module: emit(chain, schedule) -> Kernel
    cpp/           the same for a CPU
"""
