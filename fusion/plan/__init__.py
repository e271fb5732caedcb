"""What to run and how, decided without torch: frozen, hashable, printable values.

chain -> expressions -> schedules -> the space that the rules leave -> the winner

    stages.py              the vocabulary: dimensions, inputs, and four kinds of stage
    verify.py              what makes them a chain; every error names the part at fault
    chain.py               a chain of one to four matrix products, and what a search and an emitter ask of it
    workload.py            the common chains by name: gemm_chain, attention, mlp
    expression.py          tiling expressions: trees of loops over tiles, in the paper's notation
    statements.py          loads, computes, finishes and stores, and what each depends on
    placement.py           where each statement stands: the loops and statements of a block
    schedule.py            an expression with tile sizes, warps and stages
    interval.py            intervals of sizes that share a plan
    orientation.py         which letter of a value a CPU's vectors lie along
    device.py              what a machine can do, from devices/*.json
    traffic.py             the bytes that a program moves and the flops that it does, exactly
    dots.py                which values stay in registers between two products
    allocation.py          the shared memory that a GPU kernel asks for
    intensity.py           whether a chain waits for memory, with the numbers
    partition.py           a product of a chain by itself, and what is left after the first
    prune.py               the rules that drop candidates, one function each
    registers.py           the registers that its sums take
    footprint.py           shared memory of any device; warps and stages
    space.py               the candidates that are left, and the count after each rule
    performance_model.py   the time of a schedule by the paper's model
    matrix_unit.py         what a core's matrix unit (AMX) multiplies, and how long it takes
    cpu_model.py           the time of a schedule on a CPU, by its register blocks or its matrix unit
    search.py              the fastest of them: Algorithm 1, and random and exhaustive search as references
    derived.py             one gradient of a chain, as a chain again
    gradient.py            the chains of all gradients that are asked for
"""

from fusion.plan.chain import Chain
from fusion.plan.stages import Causal, Dim, Elementwise, Input, MatMul, Softmax
from fusion.plan.workload import attention, gemm_chain, mlp

__all__ = ["Causal", "Chain", "Dim", "Elementwise", "Input", "MatMul", "Softmax", "attention", "gemm_chain", "mlp"]
