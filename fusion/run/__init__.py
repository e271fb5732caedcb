"""What carries a kernel's text out, with torch and Triton.

files, check -> winner -> cache; tail -> unfused, autograd -> triton, cpp -> planned;
form -> executors -> operator -> grouped

    files.py      where files between runs lie, whole or not at all
    check.py      tensors are those of a chain, or an error says which is not
    winner.py     what a search found and what it is valid for, as JSON
    cache.py      winners in files between runs
    tail.py       what follows the last product, and its gradients, in torch
    unfused.py    a chain product by product, in torch
    autograd.py   a chain with gradients, by whatever runs chains
    triton/       Triton kernels: loaded, launched, compiled ahead of time, planned
    cpp/          C++ kernels: compiled, proved against the reference, measured beside torch, planned
    planned.py    the executor for whatever device tensors are on
    form.py       a chain without its sizes, as text
    executors.py  executors by name, and what they said of each chain
    operator.py   a chain as an operator that torch's graphs see
    grouped.py    a chain once for each group of rows
"""
