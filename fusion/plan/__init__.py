"""What to run and how, decided without torch: frozen, hashable, printable values.

stages -> chain -> workload

    stages.py     the vocabulary: dimensions, inputs, and four kinds of stage
    verify.py     what makes them a chain; every error names the part at fault
    chain.py      a chain of one to three matrix products, and what a search and an emitter ask of it
    workload.py   the common chains by name: gemm_chain, attention, mlp
"""

from fusion.plan.chain import Chain
from fusion.plan.stages import Causal, Dim, Elementwise, Input, MatMul, Softmax
from fusion.plan.workload import attention, gemm_chain, mlp

__all__ = ["Causal", "Chain", "Dim", "Elementwise", "Input", "MatMul", "Softmax", "attention", "gemm_chain", "mlp"]
