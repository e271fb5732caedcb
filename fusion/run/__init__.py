"""What carries a kernel's text out, with torch and Triton.

check -> loader -> launch; signature -> resources; winner -> cache -> executor; form -> executors -> operator -> grouped
instructions -> build -> native -> calibrate -> cpu -> planned

    check.py      tensors are those of a chain, or an error says which is not
    loader.py     source text -> a module's function
    launch.py     a kernel on tensors: on a GPU, or in Triton's interpreter
    signature.py  what Triton's launcher would tell its compiler of a kernel's arguments
    compiler.py   the process that compiles kernels without a device
    resources.py  what a compiled kernel takes: shared memory, registers, spills
    files.py      files that a reader sees whole or not at all
    winner.py     what a search found and what it is valid for, as JSON
    cache.py      winners in files between runs
    tail.py       what follows the last product, and its gradients, in torch
    autograd.py   a chain with gradients, by whatever runs chains
    executor.py   what runs a chain: planned, kept, emitted, launched, with its gradients
    instructions.py  the instruction set of this CPU
    build.py      C++ -> a library in the cache folder
    native.py     a C++ kernel on tensors
    proof.py      whether a kernel is right, against the reference
    calibrate.py  the device file of this CPU, measured
    cpu.py        what runs a chain on a CPU: planned, compiled, proved, measured beside torch
    planned.py    the executor for whatever device tensors are on
    form.py       a chain without its sizes, as text
    unfused.py    a chain product by product, in torch
    executors.py  executors by name, and what they said of each chain
    operator.py   a chain as an operator that torch's graphs see
    grouped.py    a chain once for each group of rows
"""
