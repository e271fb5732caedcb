import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scripts.testbed.own_kernels import chain_of
from scripts.testbed.peer_processes.network import read
from scripts.testbed.peer_processes.problem import Problem, rounded_to_bf16

CHAIN = Problem(kind="chain", batch=1, M=5, N=6, K=7, H=3)
ATTENTION = Problem(kind="attention", batch=2, M=5, N=5, K=4, H=4, dtype="bf16")


@pytest.mark.parametrize("problem", [CHAIN, dataclasses.replace(CHAIN, batch=3), ATTENTION])
def test_inputs_have_the_shapes_of_the_chain(problem: Problem) -> None:
    chain = chain_of(problem)
    assert {name: x.shape for name, x in problem.inputs().items()} == {
        x.name: chain.shape(x.name) for x in chain.inputs
    }
    assert problem.shapes()["E"] == chain.shape("E")
    assert problem.flops == chain.flops


def test_every_process_draws_the_same() -> None:
    again = read(CHAIN.to_json())
    assert again == CHAIN
    assert all((again.inputs()[name] == x).all() for name, x in CHAIN.inputs().items())
    assert (dataclasses.replace(CHAIN, seed=1).inputs()["A"] != CHAIN.inputs()["A"]).any()


def test_a_causal_mask_leaves_the_entries_up_to_the_diagonal() -> None:
    causal = dataclasses.replace(ATTENTION, causal=True)
    assert causal.flops == 2 * 2 * (5 * 6 // 2) * (4 + 4)
    assert dataclasses.replace(causal, M=7).flops == 2 * 2 * (5 * 6 // 2 + 2 * 5) * (4 + 4)


def test_a_backward_is_given_the_gradient_of_the_output() -> None:
    backward = dataclasses.replace(ATTENTION, backward=True)
    assert backward.inputs()["E"].shape == backward.shapes()["E"]
    assert backward.flops == 2 * 2 * 5 * 5 * (4 + 4 + 4 + 3 * 4 + 4)


@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1))
def test_rounding_to_bf16_is_torchs(values: list[float]) -> None:
    x = np.array(values, np.float32)
    assert (rounded_to_bf16(x) == torch.from_numpy(x).bfloat16().float().numpy()).all()
