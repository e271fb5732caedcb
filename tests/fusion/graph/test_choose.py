import torch
from torch.nn import functional

from fusion.graph import choose, trace
from fusion.run.autograd import Execution
from tests.fusion.executor import execute

X, A, B = torch.randn(7, 6), torch.randn(6, 8), torch.randn(8, 6)


def chosen(function, refuses):
    def execution_for(match):
        number = len(match.chain.products)
        return f"{number} are refused" if number in refuses else Execution(execute, f"{number} at once")

    return choose(trace(function, [X, A, B], {}).graph_module, execution_for)


def three(x, a, b):
    return functional.relu(functional.relu(x @ a) @ b) @ a


def test_what_is_refused_is_tried_in_parts():
    assert [len(m.chain.products) for m in chosen(three, {}).found.matches] == [3]
    assert [len(m.chain.products) for m in chosen(three, {3}).found.matches] == [2, 1]
    assert [len(m.chain.products) for m in chosen(three, {1, 3}).found.matches] == [2]
    assert [len(m.chain.products) for m in chosen(three, {2, 3}).found.matches] == [1, 1, 1]


def test_every_reason_is_told():
    choice = chosen(three, {1, 2, 3})
    assert not choice.found.matches
    text = str(choice)
    assert "not fused: relu: 3 are refused" in text
    assert "not fused: relu_1: 2 are refused" in text
    assert "not fused: matmul_2: 1 are refused" in text
    assert "matmul_2 runs as: 3 at once" in str(chosen(three, {}))
