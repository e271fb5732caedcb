"""JAX, compiled by XLA for the CPU; it takes as many threads as the process has cores."""

from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from jax import numpy as jnp

from scripts.testbed.peer_processes.problem import Array, Problem
from scripts.testbed.peer_processes.serve import Loaded, fastest, serve

DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16}
Function = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def load(problem: Problem) -> Loaded:
    """The best of its ways.

    Args:
        problem: What to compute.
    """
    ways: dict[str, Function] = {"products": lambda A, B, D: (A @ B) @ D}
    if problem.kind == "attention":
        ways = {"softmax": _softmax(problem), "operator": _operator(problem)}
    return fastest({name: partial(_ready, problem, way) for name, way in ways.items()})


def _softmax(problem: Problem) -> Function:
    def attention(A: jax.Array, B: jax.Array, D: jax.Array) -> jax.Array:
        C = jnp.einsum("zmk,znk->zmn", A, B) * jnp.asarray(problem.scale, A.dtype)
        if problem.causal:
            C = jnp.where(jnp.tril(jnp.ones(C.shape[1:], bool)), C, -jnp.inf)
        return jnp.einsum("zmn,znh->zmh", jax.nn.softmax(C, axis=-1), D)

    return attention


def _operator(problem: Problem) -> Function:
    def attention(A: jax.Array, B: jax.Array, D: jax.Array) -> jax.Array:
        A, B, D = (each.transpose(1, 0, 2)[None] for each in (A, B, D))
        E = jax.nn.dot_product_attention(A, B, D, scale=problem.scale, is_causal=problem.causal)
        return E[0].transpose(1, 0, 2)

    return attention


def _ready(problem: Problem, function: Function) -> Loaded:
    inputs = {name: jnp.asarray(x, DTYPES[problem.dtype]) for name, x in problem.inputs().items()}
    operands = [inputs[name] for name in "ABD"]

    @jax.jit
    def both(A: jax.Array, B: jax.Array, D: jax.Array, grad: jax.Array) -> tuple[jax.Array, ...]:
        E, backward = jax.vjp(function, A, B, D)
        return (E, *backward(grad))

    forward = jax.jit(function)

    def run() -> tuple[jax.Array, ...]:
        found = both(*operands, inputs["E"]) if problem.backward else (forward(*operands),)
        return jax.block_until_ready(found)

    def outputs() -> list[Array]:
        return [np.asarray(each, np.float32) for each in run()]

    return Loaded(run=run, outputs=outputs)


if __name__ == "__main__":
    serve(load, lambda: {"jax": jax.__version__})
