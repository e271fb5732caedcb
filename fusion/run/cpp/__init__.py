"""C++ kernels on tensors of a CPU.

instructions -> build -> native -> calibrate; proof -> executor

    instructions.py  the instruction set of this CPU
    build.py         C++ -> a library in the cache folder
    native.py        a C++ kernel on tensors
    calibrate.py     the device file of this CPU, measured
    proof.py         whether a kernel is right, against the reference
    executor.py      what runs a chain: planned, compiled, proved, measured beside torch
"""
