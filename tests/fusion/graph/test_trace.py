import pytest
import torch
from closeness import assert_equal_up_to_rounding
from torch import nn
from torch.nn import functional

from fusion.graph import TraceError, find, replace, trace
from fusion.graph.uses import barrier
from fusion.reference import run

X, A, B = torch.randn(7, 6), torch.randn(6, 8), torch.randn(8, 6)


def targets(traced):
    return [str(n.target) for n in traced.graph_module.graph.nodes if n.op == "call_function"]


def test_operations_stay_whole():
    def function(x, a, b, c):
        y = functional.gelu(functional.linear(x, a.T, c)) @ b
        p = functional.softmax(torch.einsum("ij,kj->ik", y, y), dim=-1)
        return functional.scaled_dot_product_attention(p, p, y, is_causal=True)

    assert targets(trace(function, [X, A, B, torch.randn(8)], {})) == [
        "aten.numpy_T.default", "aten.linear.default", "aten.gelu.default", "aten.matmul.default",
        "aten.einsum.default", "aten.softmax.int", "aten.scaled_dot_product_attention.default",
    ]  # fmt: skip


def test_arguments_and_results_may_be_nested():
    def function(pair, *, options, scale):
        x, a = pair
        assert isinstance(options, dict)
        return {"y": x @ a * scale, "rest": (options["b"], [scale, None, "text"])}

    traced = trace(function, [(X, A)], {"options": {"b": B}, "scale": 2})
    result = traced.result(traced.graph_module(X, A, B))
    assert result.keys() == {"y", "rest"}
    assert torch.equal(result["y"], X @ A * 2)
    assert result["rest"][0] is B
    assert result["rest"][1] == [2, None, "text"]


def test_python_may_look_at_shapes_and_arguments():
    def function(x, *weights, deep):
        for weight in weights:
            x = x @ weight if x.shape[1] == weight.shape[0] else x
        return x.relu() if deep else x

    assert targets(trace(function, [X, A, A, B], {"deep": True})) == ["aten.matmul.default"] * 2 + ["aten.relu.default"]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * 2 if x.sum() > 0 else x,
        lambda x: [row for row in x.sum(1).tolist() if row > 0],
        lambda x: x[: int(x.max())],
    ],
)
def test_branches_on_values_say_what_to_do(function):
    with pytest.raises(TraceError, match=r"what it runs depends on the values of tensors.*with torch.where"):
        trace(function, [X], {})


def test_errors_of_the_function_are_its_own():
    with pytest.raises(RuntimeError, match="must have same reduction dim"):
        trace(lambda x: x @ x, [X], {})


def test_parameters_are_those_of_the_module():
    layer = nn.Linear(6, 8)
    traced = trace(layer, [X], {})
    assert {id(p) for p in traced.graph_module.parameters()} == {id(p) for p in layer.parameters()}
    (output,) = traced.graph_module(X)
    output.sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((8,), 7.0))


def test_what_needs_a_gradient_follows_the_arguments():
    outside = nn.Parameter(torch.randn(8, 6))

    def function(x, a):
        y = x @ a
        return y @ outside, x + 1, (y.detach() * 2), y.argmax()

    traced = trace(function, [X, A], {})
    assert traced.needs_gradient([X, A]) == {"_param_constant0", "matmul_1"}
    assert traced.needs_gradient([X, A.clone().requires_grad_()]) == {
        "arg1_1", "matmul", "_param_constant0", "matmul_1",
    }  # fmt: skip


def test_nothing_that_is_computed_without_gradients_needs_one():
    def function(x, a):
        with torch.no_grad():
            frozen = x @ a
            x.add_(1)
            with torch.enable_grad():
                inner = x @ a
        return frozen, inner, x * 2

    needing = trace(function, [X, A], {}).needs_gradient([X.clone().requires_grad_(), A])
    assert needing == {"arg0_1", "add_", "matmul_1", "mul"}


def test_writes_into_what_was_just_made_are_none():
    def function(x, a, b):
        y = x @ a
        y += 1
        y.mul_(2).relu_()
        z = torch.nn.functional.linear(y, b.T)
        return z.masked_fill_(torch.tensor([True] * 6), 0.0)

    traced = trace(function, [X, A, B], {})
    assert not any(name.partition(".")[2].partition(".")[0].endswith("_") for name in targets(traced))
    assert torch.equal(traced.graph_module(X, A, B)[0], function(X, A, B))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, a, b: x.mul_(2) @ a,
        lambda x, a, b: ((y := x @ a).T.mul_(2), y)[1] @ b,
        lambda x, a, b: functional.dropout(x, training=False).mul_(2) @ a,
        lambda x, a, b: x.reshape(7, 6).mul_(2) @ a,
        lambda x, a, b: torch.add(x, 1, out=torch.empty_like(x)) @ a,
    ],
)
def test_writes_that_others_see_stay(function):
    traced = trace(function, [X, A, B], {})
    (write,) = (node for node in traced.graph_module.graph.nodes if barrier(node))
    assert "writes into a tensor: write x = x + y in place of x += y" in barrier(write)
    replaced = replace(traced.graph_module, find(traced.graph_module), lambda m: lambda t: run(m.chain, t))
    assert write.target in [node.target for node in replaced.graph.nodes]
    assert_equal_up_to_rounding("result", replaced(X.clone(), A, B)[0], function(X.clone(), A, B), roundings=16)
