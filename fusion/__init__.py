"""Chains of matrix products, with everything that stands between them, as one tuned kernel.

chain -> reference

    plan/          what to run: the chain and its stages, as values made without torch
    reference.py   the meaning of a chain in plain torch
"""

from fusion.plan import Chain, attention, gemm_chain, mlp

__all__ = ["Chain", "attention", "gemm_chain", "mlp"]
