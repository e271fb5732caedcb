"""A schedule as C++: pure functions from (chain, schedule) to the source of a kernel for a CPU.

storage -> elementwise -> statements -> nest -> kernel

    storage.py     where tensors, packed operands and tiles lie
    elementwise.py stages between products, vector by vector
    statements.py  load, compute, finish and store a tile
    nest.py        loops
    kernel.py      the module: emit(chain, schedule) -> Kernel
    include/       what kernels call: vectors of an instruction set, register blocks, tiles of AMX, packing, functions
"""
