"""OpenBLAS through NumPy, into memory that is there already; its threads and kernels are set by the environment."""

import contextlib
import io

import numpy as np

from scripts.testbed.peer_processes.problem import Array, Problem
from scripts.testbed.peer_processes.serve import DeclinedError, Loaded, serve


def load(problem: Problem) -> Loaded:
    """Two products.

    Args:
        problem: What to compute.
    """
    if problem.kind != "chain" or problem.dtype != "fp32":
        raise DeclinedError("products in fp32 alone")
    inputs = problem.inputs()
    A, B, D = (inputs[name] for name in "ABD")
    C: Array = A @ B
    E: Array = C @ D

    def run() -> None:
        np.matmul(A, B, out=C)
        np.matmul(C, D, out=E)

    def outputs() -> list[Array]:
        run()
        return [E]

    return Loaded(run=run, outputs=outputs)


def facts() -> dict[str, str]:
    """NumPy's version and the kernels that OpenBLAS took."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        np.show_runtime()
    kernels = [line.split("'")[3] for line in text.getvalue().splitlines() if "'architecture'" in line]
    return {"numpy": np.__version__, "openblas_kernels": ", ".join(kernels) or "unknown"}


if __name__ == "__main__":
    serve(load, facts)
