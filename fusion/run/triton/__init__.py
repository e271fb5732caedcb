"""Triton kernels on tensors of a GPU, or in Triton's interpreter.

loader -> launch -> executor; signature -> compiler -> resources

    loader.py     source text -> a module's function
    launch.py     a kernel on tensors: on a GPU, or in Triton's interpreter
    executor.py   what runs a chain: planned, kept, emitted, launched, with its gradients
    signature.py  what Triton's launcher would tell its compiler of a kernel's arguments
    compiler.py   the process that compiles kernels without a device
    resources.py  what a compiled kernel takes: shared memory, registers, spills
"""
