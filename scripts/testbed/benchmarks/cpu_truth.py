"""What peers must compute: the reference in float64, and how far a result in the problem's precision may be off."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fusion import reference
from scripts.testbed.own_kernels import chain_of
from scripts.testbed.peer_processes.contest import WrongError
from scripts.testbed.peer_processes.network import Network
from scripts.testbed.peer_processes.problem import Array, Problem
from scripts.testbed.peer_processes.workers import networks

ORDER_FACTOR = 8.0  # another order of summation may cost a few times the reference's own rounding error
ROWS = 2048  # of a chain that are computed at once, so that a long one fits
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Truth:
    """The results of one problem and their tolerances."""

    def __init__(self, problem: Problem | Network) -> None:
        """Compute them.

        Args:
            problem: What peers compute.
        """
        dtype = DTYPES[problem.dtype]
        exact, plain = _outputs(problem, torch.float64), _outputs(problem, dtype)
        largest = max(part.abs().max().item() for part in exact)  # some gradients are nothing but rounding
        floor = torch.finfo(dtype).eps * (largest if problem.backward else 0.0)
        self._problem = problem
        self._parts = [
            (part.numpy().reshape(-1), ORDER_FACTOR * max(_error(other, part), _rounding(part, dtype), floor))
            for part, other in zip(exact, plain, strict=True)
        ]

    def check(self, name: str, computed: Array) -> None:
        """Refuse a wrong result.

        Args:
            name: Of the peer.
            computed: E and the gradients, in one row.

        Raises:
            WrongError: If an entry is farther off than its precision excuses.
        """
        expected = sum(part.size for part, _ in self._parts)
        if computed.shape != (expected,):
            raise WrongError(f"{name} computes {computed.shape} numbers for {self._problem}, expected {expected}")
        start = 0
        for part, allowed in self._parts:
            error = float(np.abs(computed[start : start + part.size] - part).max())
            start += part.size
            if not error <= allowed:
                raise WrongError(f"{name} is off by {error:.2e} for {self._problem}, {allowed:.2e} are allowed")


def _error(plain: Tensor, exact: Tensor) -> float:
    return (plain.double() - exact).abs().max().item()


def _rounding(exact: Tensor, dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps * exact.abs().max().item()


def _outputs(problem: Problem | Network, dtype: torch.dtype) -> list[Tensor]:
    return _chain_outputs(problem, dtype) if isinstance(problem, Problem) else _network_outputs(problem, dtype)


def _network_outputs(network: Network, dtype: torch.dtype) -> list[Tensor]:
    """Hidden states, or the loss and the gradients, as the library computes them."""
    model = networks.built(network, attention="eager").to(dtype)
    ids = torch.from_numpy(network.tokens())
    function = networks.forward(model, network)
    if not network.backward:
        with torch.no_grad():
            return [function(ids)]
    loss = function(ids)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def _chain_outputs(problem: Problem, dtype: torch.dtype) -> list[Tensor]:
    """E and the gradients; a part of the batch and of the rows after the other."""
    tensors = {name: torch.from_numpy(x).to(dtype) for name, x in problem.inputs().items()}
    if problem.backward:
        operands = {name: tensors[name].requires_grad_() for name in "ABD"}
        E = _forward(problem, operands)
        return [E.detach(), *torch.autograd.grad(E, list(operands.values()), tensors["E"])]
    with torch.no_grad():
        return [_forward(problem, tensors)]


def _forward(problem: Problem, tensors: Mapping[str, Tensor]) -> Tensor:
    if problem.batch > 1 or problem.kind == "attention":
        one = chain_of(problem, batch=1)
        return torch.cat(
            [
                reference.run(one, {name: tensors[name][index : index + 1] for name in "ABD"})
                for index in range(problem.batch)
            ]
        )
    parts = []
    for start in range(0, problem.M, ROWS):
        rows = range(start, min(start + ROWS, problem.M))
        own = {"A": tensors["A"][start : rows.stop], "B": tensors["B"], "D": tensors["D"]}
        parts.append(reference.run(chain_of(problem, rows=rows), own))
    return torch.cat(parts)
