"""Chains of matrix products, with everything that stands between them, as one tuned kernel.

function -> chain -> schedule -> kernel -> result

    plan/          what to run: the chain and its stages, as values made without torch
    emit/          a schedule as the source text of a kernel, by pure functions
    run/           kernels on tensors: planned, kept, loaded and launched, with their gradients
    graph/         the chains in a Python function, and the function with kernels in their place
    api.py         fuse: a function or a module that runs its chains as kernels, and explains itself
    compile.py     torch.compile(model, backend="mcfuser"): the same for all of a model, the rest by Inductor
    hugging_face.py  attn_implementation="mcfuser" for the models of that library
    experts.py     the feed-forward layers of Mixture-of-Experts
    reference.py   the meaning of a chain in plain torch
"""

from typing import TYPE_CHECKING, Any

from fusion.plan import Chain, attention, gemm_chain, mlp

if TYPE_CHECKING:
    from fusion.api import fuse
    from fusion.compile import report

__all__ = ["Chain", "attention", "fuse", "gemm_chain", "mlp", "report"]


def __getattr__(name: str) -> Any:
    """What runs on tensors, imported when it is asked for: plans are made without torch."""
    if name == "fuse":
        from fusion.api import fuse

        return fuse
    if name == "report":
        from fusion.compile import report

        return report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
