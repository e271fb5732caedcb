"""What carries a plan out: streams, buffers, messages and products; decides nothing.

ranks.py       the ranks that share experts; sums and stacks over all experts
comm.py        what ranks agree on, and the all-to-alls between them
buffers.py     memory shared between chunks and between layers
recorder.py    what runs when on which stream, if somebody asks
choices.py     what searches found, kept in files between runs
adaptive.py    a chooser decides for every call, on numbers that ranks exchanged
runtime.py     what a layer runs on beside its experts
executor.py    a schedule's operations on a CPU or on CUDA streams
stages.py      the pieces of an expert's computation: up, down, and their gradients
modules.py     the same for any modules, by autograd
passes.py      one forward and one backward of the layer, operation by operation
pipeline.py    both as one differentiable function
"""
